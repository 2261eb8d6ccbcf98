"""Rank allocation as a pipeline: features of layers, measurements, the search and its files."""
