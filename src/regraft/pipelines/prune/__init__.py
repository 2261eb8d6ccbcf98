"""Pruning as a pipeline: from settings to a plan, and from a plan to a pruned model, in memory or layer by layer."""
