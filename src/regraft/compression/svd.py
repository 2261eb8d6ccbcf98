"""Plain truncated SVD of the weight: the least error of the weight itself, without regard to its inputs."""

from __future__ import annotations

from regraft.compression.contract import COMPRESSORS, Compressor, Evidence
from regraft.numerics.truncation import Truncation, truncation


def truncate(evidence: Evidence) -> Truncation:
    """Decomposes ``W``; a dropped singular value s costs s^2 of ``|W - W'|_F^2``."""
    return truncation(evidence.weight_OI, None, None)


COMPRESSORS.include(Compressor("svd", looks_at="weights", unit="squared error", adds_bias=False, truncate=truncate))
