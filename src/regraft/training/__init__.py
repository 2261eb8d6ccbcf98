"""Recovery of a pruned model by training: the Hugging Face Trainer with checkpoints that survive a kill."""
