"""Mathematics on tensors: decompositions, frames, deep factorizations, matrix completion.

Nothing here knows a module, a model or a file. Everything is float64 unless told otherwise, draws from the generator it is
given, and leaves the global one alone.
"""
