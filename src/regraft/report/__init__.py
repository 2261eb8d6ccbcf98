"""The page of a run: table of the models, loss curve, cuts, samples, and provenance."""
