"""SVD-LLM: the least squared error of the layer's output on the calibration text (arXiv 2403.07378, section 3.2).

With ``C = E[x x'] = R R'`` the truncation of ``W R`` loses exactly its dropped singular values: ``E|W x - W' x|^2`` is the sum of their
squares. The paper takes R from Cholesky, which fails on singular ``C``; any root gives the same ``W'``, and ours always exists.
"""

from __future__ import annotations

from regraft.compression.contract import COMPRESSORS, Compressor, Evidence
from regraft.numerics.truncation import Truncation, truncation


def truncate(evidence: Evidence) -> Truncation:
    """Decomposes ``W C^1/2``; a dropped singular value s costs s^2 of ``E|W x - W' x|^2``."""
    return truncation(evidence.weight_OI, evidence.second(), None)


COMPRESSORS.include(Compressor("svd_llm", looks_at="inputs", unit="squared error", adds_bias=False, truncate=truncate))
