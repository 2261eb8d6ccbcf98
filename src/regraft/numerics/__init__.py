"""Mathematics on tensors: decompositions, frames, chains of factors, moments, re-fits and removal orders.

Nothing here knows a module, a model or a file. Functions compute in float64 unless their documentation says otherwise, draw from the
generator that they are given, and never use the global one.
"""
