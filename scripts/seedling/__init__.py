"""How the embedded default model of regraft is made: tokenizer, batches, training, baselines, model card."""
