"""Measurements of a model by one harness: loss, size, speed, and a sample of its text."""
