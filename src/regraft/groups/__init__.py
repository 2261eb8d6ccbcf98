"""Which weights of a model must be cut together."""
