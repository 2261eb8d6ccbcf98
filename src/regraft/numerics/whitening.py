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


@dataclass(frozen=True)
class Metric:
    """Second moments as a metric: what a direction counts, ``M = scale (square - sums' sums)``.

    Attributes:
        square_DD: Sum of outer products, symmetric positive semidefinite up to rounding, float64 (width, width).
        damping: Share of the identity that is mixed in, as in :func:`root_of`.
        what: Names the moments in a message.
        scale: Factor of the moments.
        sums_GD: Sums of rows, (groups, width), whose outer products are subtracted, for a covariance; None for none.
    """

    square_DD: Tensor
    damping: float = 0.0
    what: str = "second moments"
    scale: float = 1.0
    sums_GD: Tensor | None = None

    def root(self) -> Root:
        """Returns the root; of the identity where the moments are zero.

        Raises:
            InputError: The moments hold NaN or infinity.
        """
        moments = self.square_DD.double() * self.scale
        if self.sums_GD is not None:
            moments.addmm_(self.sums_GD.T, self.sums_GD, alpha=-self.scale)
        return root_of(moments, damping=self.damping, what=self.what)

    def times(self, columns_DN: Tensor) -> Tensor:
        """Returns the metric times a matrix, float64 (width, n), without a second matrix of the metric's size.

        Raises:
            InputError: The moments hold NaN or infinity.
        """
        refuse_strange(self.square_DD, self.what)
        if not self.square_DD.any():
            return columns_DN
        found = (self.square_DD.double() @ columns_DN).mul_(self.scale)
        trace = float(self.square_DD.diagonal().sum())
        if self.sums_GD is not None:
            found.addmm_(self.sums_GD.T, self.sums_GD @ columns_DN, alpha=-self.scale)
            trace -= float(self.sums_GD.square().sum())
        if self.damping:
            mean = self.scale * trace / self.square_DD.shape[0]
            found.mul_(1.0 - self.damping).add_(columns_DN, alpha=self.damping * mean)
        return found


def root_of(moments_DD: Tensor, *, damping: float = 0.0, floor: float = FLOOR, what: str = "second moments") -> Root:
    """Returns the root of damped second moments; of the identity where they are zero, since then nothing depends on them.

    Args:
        moments_DD: Symmetric positive semidefinite up to rounding, (width, width).
        damping: Number from 0, the moments as they are, to 1, the mean of their diagonal in every direction: what lies between is a mixture
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
    refuse_strange(moments_DD, what)
    wide = moments_DD.double()
    return 0.5 * (wide + wide.T)


def refuse_strange(moments_DD: Tensor, what: str) -> None:
    """Refuses moments that are not finite.

    Raises:
        InputError: They hold NaN or infinity.
    """
    if not bool(torch.isfinite(moments_DD).all()):
        raise InputError(f"{what} on the calibration text hold NaN or infinity; use `dtype=float32` or other calibration text")
