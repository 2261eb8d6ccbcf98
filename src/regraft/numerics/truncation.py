"""Truncated decompositions of a weight in a metric of its inputs and one of its outputs: factors at every rank from one decomposition.

With positive definite ``M`` on the output side and ``C`` on the input side, the matrix of rank r that minimises

    tr( M (W - W') C (W - W')' ) = || M^1/2 (W - W') C^1/2 ||_F^2

is ``M^-1/2 [M^1/2 W C^1/2]_r C^-1/2`` with ``[.]_r`` the truncated singular value decomposition (Eckart, Young and Mirsky), and what
remains is the sum of the dropped squared singular values. Since the truncation is a projection onto the r leading left vectors ``U_r``,
this equals

    W' = (M^-1/2 U_r) (U_r' M^1/2 W)

which needs no inverse of ``C``: inputs that never vary make nothing explode, and at full rank ``W' = W`` to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg
from regraft.numerics.checks import checked_count
from regraft.numerics.svd import canonical_signs
from regraft.numerics.whitening import Root


@dataclass(frozen=True)
class Factors:
    """Two thin matrices in the place of a weight.

    Attributes:
        left_OR: B, (out, rank).
        right_RI: A, (rank, in).
        bias_O: Bias added to the layer's own, (out,): ``(W - BA) E[x]``, which keeps the mean of the outputs; None for none.
    """

    left_OR: Tensor
    right_RI: Tensor
    bias_O: Tensor | None


@dataclass(frozen=True)
class Truncation:
    """A weight as a sum of rank-one terms, the most valuable first, each with its price.

    Attributes:
        left_OK: float64 (out, k), k = min(out, in).
        right_KI: float64 (k, in); ``left_OK @ right_KI`` is the weight.
        price_K: What dropping each term costs, descending, float64 (k,): prices add up.
        mean_I: Mean of the inputs where the output's mean is kept by a bias, float64 (in,); else None.
        mean_O: That of the outputs without their own bias, ``W E[x]``; None with the other.
    """

    left_OK: Tensor
    right_KI: Tensor
    price_K: Tensor
    mean_I: Tensor | None = None
    mean_O: Tensor | None = None

    @property
    def full_rank(self) -> int:
        """Rank of the whole matrix at most."""
        return self.price_K.shape[0]

    def at(self, rank: int) -> Factors:
        """Returns the factors of a rank.

        Raises:
            InputError: The rank is below 1 or above the full one.
        """
        checked_count(rank, "rank")
        if rank > self.full_rank:
            rows, columns = self.left_OK.shape[0], self.right_KI.shape[1]
            raise InputError(f"rank {rank} is above {self.full_rank}, the full rank of a {rows} x {columns} matrix; lower it")
        assert rank <= self.left_OK.shape[1], "terms that were forgotten are asked for"
        left_OR, right_RI = self.left_OK[:, :rank], self.right_KI[:rank]
        if self.mean_I is None or self.mean_O is None:
            return Factors(left_OR, right_RI, None)
        return Factors(left_OR, right_RI, self.mean_O - left_OR @ (right_RI @ self.mean_I))

    def shortened(self, rank: int, dtype: torch.dtype) -> Truncation:
        """Returns the same without the terms beyond a rank, factors in another type; prices are those of all terms."""
        mean_I, mean_O = (None if mean is None else mean.to(dtype) for mean in (self.mean_I, self.mean_O))
        left_OR, right_RI = self.left_OK[:, :rank].to(dtype).contiguous(), self.right_KI[:rank].to(dtype).contiguous()
        return Truncation(left_OR, right_RI, self.price_K, mean_I, mean_O)

    def damage(self) -> Tensor:
        """Returns what truncation costs at every rank from 0 to the full one, float64 (k + 1,): the sum of the dropped prices."""
        dropped = self.price_K.flip(0).cumsum(0).flip(0)
        return torch.cat([dropped, dropped.new_zeros(1)])


def truncation(
    weight_OI: Tensor, inputs: Root | None, outputs: Root | None, *, scale: float = 1.0, mean_I: Tensor | None = None
) -> Truncation:
    """Decomposes a weight in a metric of inputs and one of outputs.

    Args:
        weight_OI: The weight, (out, in), of any float dtype.
        inputs: Root of the metric of the inputs; None for the identity.
        outputs: Root of the metric of the outputs; None for the identity.
        scale: Price of a dropped singular value s is ``scale * s^2``.
        mean_I: Mean of the inputs, where a bias is to keep the mean of the outputs.

    Raises:
        InputError: The weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight_OI).all()):
        raise InputError("a weight to decompose holds NaN or infinity; use another checkpoint")
    weight = weight_OI.double()
    seen = weight if outputs is None else outputs.root_DD @ weight
    left, values, right_h = linalg.svd(seen if inputs is None else seen @ inputs.root_DD)
    left, _ = canonical_signs(left, right_h.T)
    return Truncation(
        left_OK=left if outputs is None else outputs.inverse_DD @ left,
        right_KI=left.T @ seen,
        price_K=scale * values.square(),
        mean_I=mean_I,
        mean_O=None if mean_I is None else weight @ mean_I,
    )
