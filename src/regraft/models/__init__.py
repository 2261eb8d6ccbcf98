"""Loading, inspection and saving of Hugging Face causal language models."""
