"""Leading singular triplets: exact, or by randomised subspace iteration, which needs only products with the matrix.

References:
    [HMT11] Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithms 4.4 and 5.1.
    [BAK08] Bro, Acar, Kolda, "Resolving the sign ambiguity in the singular value decomposition", J. Chemometrics 22 (2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg
from regraft.numerics.checks import checked_count

OVERSAMPLE = 10
"""Extra columns of the sketch; [HMT11] section 4.2 finds 5 to 10 enough."""


class Triplets(NamedTuple):
    """The k leading singular triplets of an m x n matrix: ``left @ diag(values) @ right.T``."""

    left: Tensor
    """m x k, orthonormal columns."""
    values: Tensor
    """k, descending, not negative."""
    right: Tensor
    """n x k, orthonormal columns."""


def canonical_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Flips the sign of each pair of singular vectors so that the entry of largest magnitude of the left one is positive.

    A singular value decomposition leaves the sign of every pair open. [BAK08] choose it by the data; we use the entry of largest
    magnitude (the first of equal ones), which needs only the vectors.

    Args:
        left: m x k.
        right: n x k.

    Returns:
        The same two matrices, with the signs of paired columns flipped together.
    """
    largest = left.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(left.gather(0, largest) < 0, -1.0, 1.0).to(left.dtype)
    return left * signs, right * signs


def top_triplets(matrix: Tensor, rank: int) -> Triplets:
    """Returns the leading triplets in the matrix's dtype, with canonical signs, by a full decomposition in float64.

    Args:
        matrix: m x n.
        rank: 1 to min(m, n).

    Raises:
        InputError: The rank is out of range, or the matrix holds NaN or infinity.
    """
    _check(rank, matrix.shape[0], matrix.shape[1])
    if not bool(torch.isfinite(matrix).all()):
        raise InputError("a matrix to decompose holds NaN or infinity; remove such entries first")
    left, values, right_h = linalg.svd(matrix.double())
    left, right = canonical_signs(left[:, :rank], right_h[:rank].T)
    return Triplets(left.to(matrix.dtype), values[:rank].to(matrix.dtype), right.to(matrix.dtype))


def sketched_triplets(
    times: Callable[[Tensor], Tensor],
    transpose_times: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator,
    *,
    iterations: int = 8,
    device: torch.device | str = "cpu",
) -> Triplets:
    """Returns the leading triplets of a matrix that is given by its products ([HMT11] algorithms 4.4 and 5.1).

    The cost is ``2 * iterations + 2`` products with rank + 10 columns; the matrix itself is never formed.

    Args:
        times: Product with the matrix, n x k -> m x k.
        transpose_times: Product with its transpose, m x k -> n x k.
        shape: (m, n).
        rank: 1 to min(m, n).
        generator: A generator on the CPU, for every device, so that the sketch is the same everywhere.
        iterations: Number of subspace iterations; the error falls as (s_{k+1}/s_k)^(2 * iterations).
        device: Device of the products.

    Raises:
        InputError: The rank is out of range.
    """
    rows, columns = shape
    _check(rank, rows, columns)
    width = min(rank + OVERSAMPLE, rows, columns)
    sketch = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(device)
    basis = linalg.qr(times(sketch)).q
    for _ in range(iterations):
        basis = linalg.qr(times(linalg.qr(transpose_times(basis)).q)).q
    inner_left, values, right_h = linalg.svd(transpose_times(basis).T)
    left, right = canonical_signs((basis @ inner_left)[:, :rank], right_h[:rank].T)
    return Triplets(left, values[:rank], right)


def randomized_triplets(matrix: Tensor, rank: int, generator: torch.Generator, *, iterations: int = 8) -> Triplets:
    """Returns the leading triplets of a dense matrix by :func:`sketched_triplets`: O(m n rank) instead of O(m n min(m, n)).

    Args:
        matrix: m x n, any floating dtype; it is decomposed in float64, and the triplets have its dtype.
        rank: 1 to min(m, n).
        generator: A generator on the CPU.
        iterations: Number of subspace iterations.

    Raises:
        InputError: The rank is out of range.
    """
    wide = matrix.double()
    found = sketched_triplets(
        lambda block: wide @ block,
        lambda block: (block.T @ wide).T,  # reads the matrix along its rows, three times as fast as wide.T @ block
        (matrix.shape[0], matrix.shape[1]),
        rank,
        generator,
        iterations=iterations,
        device=matrix.device,
    )
    return Triplets(*(part.to(matrix.dtype) for part in found))


def factored_triplets(left: Tensor, right: Tensor) -> Triplets:
    """Returns all triplets of ``left @ right.T`` without forming the product, by two QR decompositions and a small SVD.

    Args:
        left: m x k.
        right: n x k, k at most min(m, n).
    """
    q_left, r_left = linalg.qr(left)
    q_right, r_right = linalg.qr(right)
    inner_left, values, inner_right_h = linalg.svd(r_left @ r_right.T)
    new_left, new_right = canonical_signs(q_left @ inner_left, q_right @ inner_right_h.T)
    return Triplets(new_left, values, new_right)


def _check(rank: int, rows: int, columns: int) -> None:
    checked_count(rank, "rank")
    if rank > min(rows, columns):
        raise InputError(f"rank {rank} is too large: a {rows} x {columns} matrix has {min(rows, columns)} singular values; lower it")
