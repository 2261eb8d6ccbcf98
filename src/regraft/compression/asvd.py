"""ASVD: channels that carry more activation weigh more (arXiv 2312.05821, section 3.2).

``W S`` is decomposed, with ``S = diag(mean |x|^alpha)``. Inputs are scaled channel by channel; correlations between channels are ignored.
"""

from __future__ import annotations

from dataclasses import replace

from regraft.compression.contract import COMPRESSORS, Compressor, Evidence
from regraft.numerics.truncation import Truncation, truncation
from regraft.numerics.whitening import refuse_strange

ALPHA = 0.5  # section 4.1 of the paper
# Relative to the largest: a channel that was silent on the calibration text is not worth nothing.
_FLOOR = 1e-6


def truncate(evidence: Evidence) -> Truncation:
    """Decomposes ``W S``; a dropped singular value s costs s^2 of ``|(W - W') S|_F^2``."""
    magnitude_I = evidence.seen().magnitude_D
    refuse_strange(magnitude_I, f"inputs of '{evidence.name}'")
    scale_I = magnitude_I.pow(ALPHA)
    if not scale_I.any():
        scale_I = scale_I + 1.0
    scale_I = scale_I.clamp_min(_FLOOR * scale_I.max())
    scaled = truncation(evidence.weight_OI.double() * scale_I, None, None)
    return replace(scaled, right_KI=scaled.right_KI / scale_I)


COMPRESSORS.include(Compressor("asvd", looks_at="inputs", unit="squared error", adds_bias=False, truncate=truncate))
