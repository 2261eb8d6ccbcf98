"""Load, look at and save Hugging Face causal language models."""
