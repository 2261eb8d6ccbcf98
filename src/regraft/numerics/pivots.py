"""A matrix of rank r as r of its rows and the coefficients of the others: r (m + n - r) numbers instead of r (m + n), and exact.

PIFA (arXiv 2501.19090) stores ``W' = P [I; K] W_p``: ``W_p`` are r linearly independent rows, ``K`` says how the other m - r rows follow
from them, and P puts all rows in order. Here the pivot rows are those that Gaussian elimination with row exchanges takes from the left
factor, so that the multipliers on the way are at most one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg


@dataclass(frozen=True)
class Pivoted:
    """A matrix of rank r by its pivot rows.

    Attributes:
        rows_RI: The pivot rows, float64 (r, in).
        others_SR: Coefficients of the other rows, float64 (out - r, r).
        order_O: int64 (out,): row i of the matrix is row ``order_O[i]`` of the pivot rows followed by the others.
    """

    rows_RI: Tensor
    others_SR: Tensor
    order_O: Tensor

    def dense(self) -> Tensor:
        """Returns the matrix, float64 (out, in)."""
        return torch.cat([self.rows_RI, self.others_SR @ self.rows_RI])[self.order_O]


def pivoted(left_OR: Tensor, right_RI: Tensor) -> Pivoted:
    """Returns the pivot rows of ``left_OR @ right_RI``.

    Args:
        left_OR: (out, r) of full column rank, r at most out.
        right_RI: (r, in).

    Raises:
        InputError: The left factor has a lower rank than it has columns.
    """
    left = left_OR.double()
    rank = left.shape[1]
    exchanges, lower, upper = linalg.lu(left)
    steps = upper.diagonal().abs()
    if rank > left.shape[0] or not bool(steps.min() > 1e-13 * steps.max()):
        raise InputError(f"factors of rank {rank} have dependent columns, so that no {rank} rows span the rest; lower the rank")
    # lower = exchanges' B upper^-1: its first r rows are a unit triangle, and the others follow from them.
    others = linalg.solve(lower[:rank].T, lower[rank:].T).T
    places = exchanges.argmax(dim=0)  # row j of `lower` is row places[j] of B
    back = torch.empty_like(places)
    back[places] = torch.arange(len(places), device=left.device)
    return Pivoted(left[places[:rank]] @ right_RI.double(), others, back)
