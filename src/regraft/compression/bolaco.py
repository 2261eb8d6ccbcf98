"""Bolaco: principal components of the layer's outputs, and a bias that keeps their mean (arXiv 2405.10616, section 3.1).

With ``Cov(W x) = U S U'`` the factors are ``B = U_r`` and ``A = U_r' W``, the bias is ``(I - U_r U_r') E[W x]``. The covariance is
pooled: the mean of those within groups of the calibration text. ``Cov(W x) = W Cov(x) W'``, so that the moments of the inputs are enough.
"""

from __future__ import annotations

from regraft.compression.contract import COMPRESSORS, Compressor, Evidence
from regraft.numerics.truncation import Truncation, truncation

GROUPS = 32  # of calibration text, within which covariances are taken


def truncate(evidence: Evidence) -> Truncation:
    """Decomposes ``W Cov(x)^1/2``; a dropped singular value s costs s^2 of ``E|y - y'|^2``, the mean of y being kept."""
    return truncation(evidence.weight_OI, evidence.covariance(), None, mean_I=evidence.seen().mean_D)


COMPRESSORS.include(Compressor("bolaco", looks_at="inputs", unit="squared error", adds_bias=True, truncate=truncate))
