"""Orthonormal frames: random ones, complements, and the pair that compresses a deep factorization.

A frame is a matrix with orthonormal columns.

References:
    [MEZ07] Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 54 (2007).
    [YAR24] Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
        ICML 2024, arXiv 2406.04112, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg
from regraft.numerics.svd import Triplets


class Frames(NamedTuple):
    """The outer factors of a compressed factorization ``left @ core @ right.T`` of an m x n matrix."""

    left: Tensor
    """m x 2r, orthonormal columns (U_{L,1})."""
    right: Tensor
    """n x 2r, orthonormal columns (V_{1,1})."""


def random_frame(rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws a rows x columns frame from the uniform (Haar) distribution ([MEZ07]: QR with the signs of R's diagonal).

    Args:
        rows: At least ``columns``.
        columns: How many orthonormal columns.
        generator: A generator on the CPU.
        dtype: Dtype of the result; the frame is drawn and orthonormalised in float64.

    Raises:
        InputError: More columns than rows.
    """
    if columns > rows:
        raise InputError(f"{columns} orthonormal columns do not fit {rows} rows; ask for at most {rows}")
    return _positive_qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def semi_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draws a rows x columns matrix with orthonormal columns, or with orthonormal rows when it is wider than tall (float64)."""
    if rows >= columns:
        return random_frame(rows, columns, generator)
    return random_frame(columns, rows, generator).T


def frame_outside(basis: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Draws ``columns`` orthonormal columns, each orthogonal to every column of a frame.

    Args:
        basis: n x k, orthonormal columns.
        columns: Number of columns to draw, at most n - k.
        generator: A generator on the CPU.

    Returns:
        n x columns, on the device of the basis and in its dtype.

    Raises:
        InputError: More than n - k columns were requested.
    """
    rows, taken = basis.shape
    if columns > rows - taken:
        raise InputError(
            f"{columns} columns do not fit beside {taken} in {rows} dimensions; ask for at most {rows - taken}, or lower the rank"
        )
    wide = basis.double()
    draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(basis.device)
    for _ in range(2):  # the first projection leaves an error as large as that of the basis; the second removes it
        draw = linalg.qr(draw - wide @ (wide.T @ draw)).q
    return draw.to(basis.dtype)


def compact_frames(gradient: Triplets, generator: torch.Generator) -> Frames:
    """Builds the outer factors from the leading triplets of the end-to-end gradient alone.

    [YAR24] take range V_{1,1} = span[V_G, Q^T U_G] and U_{L,1} = Q V_{1,1}, where Q is the product of the initial factors, each
    divided by its scale. Only Q V_G and Q^T U_G matter, and for a random Q they are random frames; so we draw B in place of
    Q V_G, orthogonal to U_G, and A in place of Q^T U_G, orthogonal to V_G: right = [V_G, A], left = [B, U_G]. For a square matrix
    that is the theorem's construction for one particular Q (the orthogonal ones that send V_G to B and A to U_G); for a
    rectangular one it stays orthonormal. It costs O((m + n) r^2) and forms no d x d matrix.

    Args:
        gradient: r triplets of the gradient with respect to the m x n end-to-end matrix (its sign does not matter).
        generator: A generator on the CPU.

    Returns:
        Frames of 2r columns.

    Raises:
        InputError: 2r exceeds m or n.
    """
    rank = gradient.values.shape[0]
    beside_left = frame_outside(gradient.left, rank, generator)
    beside_right = frame_outside(gradient.right, rank, generator)
    return Frames(torch.cat([beside_left, gradient.left], dim=1), torch.cat([gradient.right, beside_right], dim=1))


def complete_basis(frame: Tensor) -> Tensor:
    """Returns the n - k columns (n x (n - k)) that complete an n x k frame to an orthonormal basis of R^n."""
    return linalg.qr(frame, complete=True).q[:, frame.shape[1] :]


def subspace_distance(first: Tensor, second: Tensor) -> float:
    """Returns the sine of the largest angle between the ranges of two frames, and 1 when their dimensions differ."""
    if first.shape != second.shape:
        return 1.0
    return linalg.spectral_norm(first - second @ (second.T @ first))


def _positive_qr(matrix: Tensor) -> Tensor:
    q, r = linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
