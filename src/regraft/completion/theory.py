"""The invariant subspace of a deep factorization: three ways to build it, and the theorem's statement about the other directions.

With W_l(0)^T W_l(0) = eps^2 I and a target of rank r, gradient descent keeps
W_l(t) = U_l blkdiag(W~_l(t), rho_l(t) I_{d-2r}) V_l^T with V_{l+1} = U_l: all learning happens in the 2r dimensions of V_{1,1}, the
first 2r columns of V_1.

References:
    [YAR24] Yaras, Wang, Balzano, Qu, arXiv 2406.04112, sections 2 and 3 and the proof of the theorem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regraft.numerics import linalg
from regraft.numerics.chain import Chain, compressed_start, product
from regraft.numerics.checks import checked_rank
from regraft.numerics.frames import Frames, complete_basis
from regraft.numerics.svd import top_triplets


class Blocks(NamedTuple):
    """Blocks of one factor in the theorem's bases, U_l^T W_l V_l."""

    inner: Tensor
    """2r x 2r, W~_l."""
    upper: Tensor
    """2r x (d - 2r), zero by the theorem."""
    lower: Tensor
    """(d - 2r) x 2r, zero by the theorem."""
    tail: Tensor
    """(d - 2r) x (d - 2r), rho_l I by the theorem."""


def null_space_basis(first: Tensor, gradient: Tensor, rank: int) -> Tensor:
    """Builds V_{1,1} by the recipe of [YAR24]: the complement of null(g) intersected with null(g^T W_1).

    Both null spaces are taken of the leading ``rank`` triplets, so that they exist also for a gradient of full rank (missing entries).
    Costs full decompositions of d x d matrices.

    Args:
        first: W_1(0), d x d, orthogonal times a scale.
        gradient: g, the gradient of the loss with respect to W_1 at the start, d x d.
        rank: r.

    Returns:
        d x 2r, orthonormal columns.

    Raises:
        InputError: The rank is out of range.
    """
    checked_rank(rank, first.shape[0], first.shape[1])
    left, _, right_h = linalg.svd(gradient, full=True)
    null_right = right_h[rank:].T  # d x (d - r): g maps it to (almost) nothing
    left_read = left[:, :rank].T @ first @ null_right  # r x (d - r): what g^T W_1 does to it
    kernel = linalg.svd(left_read, full=True).right_h[rank:].T
    shared = null_right @ kernel  # d x (d - 2r)
    return complete_basis(shared)


def first_gradient_basis(first: Tensor, gradient: Tensor, rank: int) -> Tensor:
    """Builds V_{1,1} = span[right vectors of g, W_1^T left vectors of g] from the gradient of the first factor.

    Args:
        first: W_1(0), d x d.
        gradient: g, the gradient of the loss with respect to W_1, d x d.
        rank: r.

    Returns:
        d x 2r, orthonormal columns.

    Raises:
        InputError: The rank is out of range.
    """
    checked_rank(rank, first.shape[0], first.shape[1])
    leading = top_triplets(gradient, rank)
    pulled = first.T @ leading.left
    return linalg.qr(torch.cat([leading.right, pulled / linalg.spectral_norm(pulled)], dim=1)).q


def end_to_end_basis(factors: Sequence[Tensor], gradient: Tensor, rank: int) -> Tensor:
    """Builds V_{1,1} = span[V_G, Q^T U_G] from the gradient with respect to the end-to-end matrix.

    Args:
        factors: W_1(0), ..., W_L(0), d x d each, orthogonal times a scale.
        gradient: G, the gradient of the loss with respect to the end-to-end matrix, d x d.
        rank: r.

    Returns:
        d x 2r, orthonormal columns.

    Raises:
        InputError: The rank is out of range.
    """
    checked_rank(rank, gradient.shape[0], gradient.shape[1])
    leading = top_triplets(gradient, rank)
    pulled = product(factors).T @ leading.left
    return linalg.qr(torch.cat([leading.right, pulled / linalg.spectral_norm(pulled)], dim=1)).q


def compress(chain: Chain, basis: Tensor, scale: float, gamma: float) -> Chain:
    """Compresses a full-width chain at its start: U_{L,1} = Q V_{1,1}, inner factors scale * I.

    Args:
        chain: Square factors W_l(0), orthogonal times ``scale``.
        basis: V_{1,1}, d x 2r.
        scale: Epsilon.
        gamma: Rate of the outer factors, relative to the inner ones.
    """
    depth = len(chain.factors)
    left = product(chain.factors) @ basis / scale**depth
    return compressed_start(Frames(left, basis), depth, scale, gamma)


def bases(chain: Chain, basis: Tensor, scale: float) -> list[Tensor]:
    """Returns V_1, U_1 = V_2, ..., U_L: L + 1 orthogonal d x d matrices, the images of V_1 under the factors at the start.

    Args:
        chain: Square factors at the start.
        basis: V_{1,1}, d x 2r.
        scale: Epsilon.
    """
    found = [torch.cat([basis, complete_basis(basis)], dim=1)]
    for factor in chain.factors:
        found.append(factor @ found[-1] / scale)
    return found


def blocks(chain: Chain, carried: Sequence[Tensor], width: int) -> list[Blocks]:
    """Splits every factor, at any time t, into blocks in the bases of the start.

    Args:
        chain: Square factors at time t.
        carried: The result of :func:`bases`.
        width: 2r.
    """
    seen = [after.T @ factor @ before for factor, before, after in zip(chain.factors, carried[:-1], carried[1:], strict=True)]
    return [Blocks(w[:width, :width], w[:width, width:], w[width:, :width], w[width:, width:]) for w in seen]


def rho_path(scale: float, depth: int, step_size: float, weight_decay: float, steps: int, momentum: float = 0.0) -> list[float]:
    """Returns rho(0), ..., rho(steps), equal in all layers: rho <- rho (1 - eta lambda - eta prod_{k != l} rho_k^2).

    With momentum the change of rho accumulates as in heavy ball: v <- momentum v + rho (lambda + rho^(2(depth - 1))).
    """
    rho, velocity = scale, 0.0
    path = [rho]
    for _ in range(steps):
        velocity = momentum * velocity + rho * (weight_decay + rho ** (2 * (depth - 1)))
        rho -= step_size * velocity
        path.append(rho)
    return path


def compression_error(dimension: int, width: int, rho: Sequence[float]) -> float:
    """Returns ||f - f_C||_F = sqrt(d - 2r) prod_l rho_l, at most sqrt(d - 2r) eps^L.

    Args:
        dimension: d.
        width: 2r.
        rho: The value of rho_l for each layer.
    """
    return math.sqrt(dimension - width) * abs(math.prod(rho))
