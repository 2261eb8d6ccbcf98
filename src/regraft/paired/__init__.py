"""Cheap paired measurements of rank vectors: short recoveries that share batches, seeds and initial values."""
