"""Matrix completion by compressed deep factorization, after arXiv 2406.04112: estimator, theory, baselines, and files of ratings."""
