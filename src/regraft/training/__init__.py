"""Win quality back by training: the Hugging Face Trainer with checkpoints that survive a kill."""
