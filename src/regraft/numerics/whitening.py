"""Square roots of second moments, for metrics of inputs and outputs that may be singular or badly conditioned.

A truncation that is optimal for inputs with ``C = E[x x']`` decomposes ``W R`` with ``C = R R'`` (SVD-LLM, arXiv 2403.07378, section 3.2,
takes R from Cholesky; any other root differs by an orthogonal matrix on the right, and changes nothing). Cholesky fails where inputs live
in a subspace, as after a few calibration windows. The root here is the symmetric one, from an eigendecomposition in float64 whose values
are lifted to a floor: directions that the calibration text never showed count a little, instead of not at all or without bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg

# Relative to the largest eigenvalue. Sums of a thousand float64 products are good to about 1e-13.
FLOOR = 1e-12


@dataclass(frozen=True)
class Root:
    """A symmetric root of a symmetric positive definite matrix.

    Attributes:
        root_DD: ``R`` with ``R R = M``, float64 (width, width).
        inverse_DD: Its inverse.
    """

    root_DD: Tensor
    inverse_DD: Tensor


def root_of(moments_DD: Tensor, *, damping: float = 0.0, floor: float = FLOOR, what: str = "second moments") -> Root:
    """Returns the root of damped second moments; of the identity where they are zero, since then nothing depends on them.

    Args:
        moments_DD: Symmetric positive semidefinite up to rounding, (width, width).
        damping: From 0, the moments as they are, to 1, the mean of their diagonal in every direction: what lies between is a mixture
            ``(1 - damping) M + damping mean(diag M) I``, whose trace stays that of M.
        floor: Least eigenvalue, relative to the largest.
        what: Names the moments in a message.

    Raises:
        InputError: The moments hold NaN or infinity, or the damping is not from 0 to 1.
    """
    if not 0.0 <= damping <= 1.0:
        raise InputError(f"damping {damping:g} is not a share; give a number from 0 to 1")
    moments = checked(moments_DD, what)
    mixed = (1.0 - damping) * moments
    mixed.diagonal().add_(damping * moments.diagonal().mean())
    if not mixed.any():
        mixed.diagonal().fill_(1.0)
    values, vectors = linalg.eigh(mixed)
    roots = values.clamp_min(floor * float(values[-1])).sqrt()
    return Root((vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)


def checked(moments_DD: Tensor, what: str) -> Tensor:
    """Returns second moments in float64, made exactly symmetric.

    Raises:
        InputError: They hold NaN or infinity.
    """
    if not bool(torch.isfinite(moments_DD).all()):
        raise InputError(f"{what} on the calibration text hold NaN or infinity; use `dtype=float32` or other calibration text")
    wide = moments_DD.double()
    return 0.5 * (wide + wide.T)
