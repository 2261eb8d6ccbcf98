"""Prune a language model, regrow it low-rank, serve it anywhere."""
