"""The page of a run: the table of its models, the loss curve, what was cut, samples, and how it came to be."""
