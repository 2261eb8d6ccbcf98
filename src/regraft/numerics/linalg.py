"""Typed wrappers of the few ``torch.linalg`` functions that we use; torch leaves the types out."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QR(NamedTuple):
    """The QR decomposition ``q @ r``."""

    q: Tensor
    r: Tensor


class SVD(NamedTuple):
    """The singular value decomposition ``left @ diag(values) @ right_h``, values descending."""

    left: Tensor
    values: Tensor
    right_h: Tensor


def qr(matrix: Tensor, *, complete: bool = False) -> QR:
    """Returns q (m x k) with orthonormal columns and r upper triangular, k = min(m, n), or k = m when ``complete``."""
    found = torch.linalg.qr(matrix, mode="complete" if complete else "reduced")
    return QR(found[0], found[1])


def svd(matrix: Tensor, *, full: bool = False) -> SVD:
    """Returns the thin decomposition, or the square one when ``full``."""
    found = torch.linalg.svd(matrix, full_matrices=full)
    return SVD(found[0], found[1], found[2])


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues of a symmetric matrix, ascending, and its orthonormal eigenvectors in columns."""
    found = torch.linalg.eigh(matrix)
    return found[0], found[1]


def lu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a permutation, a unit lower triangle (m x k) and an upper one (k x n) whose product is the argument, k = min(m, n)."""
    found = torch.linalg.lu(matrix)
    return found[0], found[1], found[2]


def spectral_norm(matrix: Tensor) -> float:
    """Returns the largest singular value."""
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves ``matrix @ x = right``, batched: ... x k x k and ... x k x j."""
    return torch.linalg.solve(matrix, right)


def csr(pointers: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns a CSR tensor without checks: ``rows + 1`` pointers, and one column and one value for each entry."""
    return torch.sparse_csr_tensor(pointers, columns, values, shape, check_invariants=False)


def cholesky(matrix: Tensor) -> Tensor:
    """Returns the lower triangular L with L L^T equal to the (positive definite) matrix."""
    return torch.linalg.cholesky(matrix)


def cholesky_if_positive(matrix: Tensor) -> Tensor | None:
    """Returns the lower triangle of ``cholesky``, or None where the matrix is not positive definite."""
    found = torch.linalg.cholesky_ex(matrix)
    return None if found[1] else found[0]


def least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    """Returns the x of least norm that minimises ``|matrix @ x - right|``: k x j."""
    return torch.linalg.lstsq(matrix, right, driver=None).solution


def inverse(matrix: Tensor) -> Tensor:
    """Returns the inverse of a square matrix."""
    return torch.linalg.inv(matrix)


def inverse_of_positive(matrix: Tensor) -> Tensor | None:
    """Returns the inverse of a symmetric positive definite matrix, symmetric itself; None where it is not positive definite."""
    factor = cholesky_if_positive(matrix)
    if factor is None:
        return None
    found = torch.cholesky_inverse(factor)
    return found.add_(found.T.clone()).mul_(0.5)


def solve_right(matrix: Tensor, upper: Tensor) -> Tensor:
    """Solves ``x @ upper = matrix`` for an upper triangular ``upper``."""
    return torch.linalg.solve_triangular(upper, matrix, upper=True, left=False)


def unique(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct numbers, ascending, and for each given number its index among them."""
    found = torch.unique(numbers, return_inverse=True)
    return found[0], found[1]
