"""Truncated decompositions of a weight in a metric of its inputs and one of its outputs: factors at every rank from one decomposition.

With positive definite ``M`` on the output side and ``C`` on the input side, the matrix of rank r that minimises

    tr( M (W - W') C (W - W')' ) = || M^1/2 (W - W') C^1/2 ||_F^2

is ``M^-1/2 [M^1/2 W C^1/2]_r C^-1/2`` with ``[.]_r`` the truncated singular value decomposition (Eckart, Young and Mirsky), and what
remains is the sum of the dropped squared singular values. Since the truncation is a projection onto the r leading left vectors ``U_r``,
or the right ones ``V_r``, this equals

    W' = (M^-1/2 U_r) (U_r' M^1/2 W) = (W C^1/2 V_r) (V_r' C^-1/2)

The vectors and the squared values are those of ``(M^1/2 W) C (M^1/2 W)'`` and of ``(W C^1/2)' M (W C^1/2)``. The smaller of the two is
decomposed, so that only the metric on the smaller side needs a root: a matrix of 4,096 by 11,008 costs the eigenvectors of 4,096. Squares
are good to 1e-16 of the largest. At full rank ``W' = W`` to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg
from regraft.numerics.checks import checked_count
from regraft.numerics.svd import canonical_signs
from regraft.numerics.whitening import Metric


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

    def without_factors(self) -> Truncation:
        """Returns the prices alone, with factors of rank 0, for factors that are kept elsewhere."""
        return Truncation(self.left_OK[:, :0].clone(), self.right_KI[:0].clone(), self.price_K, self.mean_I, self.mean_O)

    def damage(self) -> Tensor:
        """Returns what truncation costs at every rank from 0 to the full one, float64 (k + 1,): the sum of the dropped prices."""
        dropped = self.price_K.flip(0).cumsum(0).flip(0)
        return torch.cat([dropped, dropped.new_zeros(1)])


def truncation(
    weight_OI: Tensor, inputs: Metric | None, outputs: Metric | None, *, scale: float = 1.0, mean_I: Tensor | None = None
) -> Truncation:
    """Decomposes a weight in a metric of inputs and one of outputs.

    Args:
        weight_OI: The weight, (out, in), of any float dtype.
        inputs: Metric of the inputs; None for the identity.
        outputs: Metric of the outputs; None for the identity.
        scale: Price of a dropped singular value s is ``scale * s^2``.
        mean_I: Mean of the inputs, where a bias is to keep the mean of the outputs.

    Raises:
        InputError: The weight, or a metric, holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight_OI).all()):
        raise InputError("a weight to decompose holds NaN or infinity; use another checkpoint")
    weight = weight_OI.double()
    if inputs is None and outputs is None:
        left, values, right_h = linalg.svd(weight)
        left, _ = canonical_signs(left, right_h.T)
        squares, right = values.square(), left.T @ weight
    elif weight.shape[0] <= weight.shape[1]:
        left, right, squares = _by_outputs(weight, inputs, outputs)
    else:
        left, right, squares = _by_inputs(weight, inputs, outputs)
    return Truncation(left, right, scale * squares, mean_I, None if mean_I is None else weight @ mean_I)


def _by_outputs(weight_OI: Tensor, inputs: Metric | None, outputs: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both factors and the squared values, by the eigenvectors of a matrix of the outputs' size."""
    root = None if outputs is None else outputs.root()
    seen_OI = weight_OI if root is None else root.root_DD @ weight_OI
    squares, left = _leading(seen_OI @ (seen_OI.T if inputs is None else inputs.times(seen_OI.T)))
    return left if root is None else root.inverse_DD @ left, left.T @ seen_OI, squares


def _by_inputs(weight_OI: Tensor, inputs: Metric | None, outputs: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both factors and the squared values, by the eigenvectors of a matrix of the inputs' size."""
    root = None if inputs is None else inputs.root()
    seen_OI = weight_OI if root is None else weight_OI @ root.root_DD
    squares, right = _leading(seen_OI.T @ (seen_OI if outputs is None else outputs.times(seen_OI)))
    return seen_OI @ right, right.T if root is None else right.T @ root.inverse_DD, squares


def _leading(product_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues of a product that is symmetric up to rounding, descending and not below 0, and its eigenvectors."""
    values, vectors = linalg.eigh(0.5 * (product_DD + product_DD.T))
    vectors, _ = canonical_signs(vectors.flip(1), vectors.flip(1))
    return values.flip(0).clamp_min(0.0), vectors
