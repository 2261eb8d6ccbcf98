"""Layer-by-layer passes over a checkpoint that is larger than memory."""
