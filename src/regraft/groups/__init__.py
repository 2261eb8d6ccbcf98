"""Groups of weights that must be cut together."""
