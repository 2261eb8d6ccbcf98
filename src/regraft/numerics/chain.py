"""A deep linear factorization as a chain of matrices, its three starts and its gradients.

The end-to-end matrix is f = F_K ... F_2 F_1, and each factor has its own rate. Every model of the theory is such a chain:

=============  ==========================================  ===================
model          factors, first to last                      rates
=============  ==========================================  ===================
full           W_1, ..., W_L (square)                      1, ..., 1
narrow         W_1 (w x n), ..., W_L (m x w)               1, ..., 1
compressed     V^T (2r x n), W~_1, ..., W~_L, U (m x 2r)   gamma, 1, ..., 1, gamma
=============  ==========================================  ===================

f is evaluated as ``left @ first`` with left = F_K ... F_2 (m x w) and first = F_1 (w x n), so that a sparse residual E enters
only through E first^T and left^T E: in the compressed chain a step costs O(observed entries x r + (m + n) r^2).

References:
    [YAR24] Yaras, Wang, Balzano, Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
        ICML 2024, arXiv 2406.04112, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.numerics.checks import checked_count, checked_number
from regraft.numerics.frames import Frames, semi_orthogonal


@dataclass(frozen=True)
class Chain:
    """Factors of an m x n matrix, first (which multiplies the input) to last.

    Attributes:
        factors: ``factors[k + 1] @ factors[k]`` is defined for every k.
        rates: Rate of each factor, relative to the step size; 0 freezes it.
        frames: Whether the first and the last factor are orthonormal outer factors, which have no scale and no decay.
    """

    factors: tuple[Tensor, ...]
    rates: tuple[float, ...]
    frames: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the end-to-end matrix."""
        return self.factors[-1].shape[0], self.factors[0].shape[1]

    @property
    def inner(self) -> tuple[Tensor, ...]:
        """The factors with a scale: all factors, or all but the two outer ones when ``frames``."""
        return self.factors[1:-1] if self.frames else self.factors

    @property
    def parameters(self) -> int:
        """Number of entries of all factors."""
        return sum(factor.numel() for factor in self.factors)

    def left(self) -> Tensor:
        """The product of all factors but the first, m x w."""
        if self.frames:  # the small factors first, because the outer factor is long
            return self.factors[-1] @ product(self.factors[1:-1])
        return product(self.factors[1:])

    def end_to_end(self) -> Tensor:
        """Returns the end-to-end matrix, m x n, dense."""
        return self.left() @ self.factors[0]

    def clone(self) -> Chain:
        """Returns a chain of copies."""
        return Chain(tuple(factor.detach().clone() for factor in self.factors), self.rates, self.frames)

    def to(self, device: torch.device | str) -> Chain:
        """Returns the chain on another device."""
        return Chain(tuple(factor.to(device) for factor in self.factors), self.rates, self.frames)


def product(factors: Sequence[Tensor]) -> Tensor:
    """Returns ``factors[-1] @ ... @ factors[0]``."""
    result = factors[0]
    for factor in factors[1:]:
        result = factor @ result
    return result


def full_start(shape: tuple[int, int], depth: int, scale: float, generator: torch.Generator) -> Chain:
    """Returns a full-width factorization with W_l(0)^T W_l(0) = scale^2 I ([YAR24], section 2).

    For a rectangular m x n matrix the hidden layers have the width of its smaller side. Then W_1 (or W_L) has orthonormal rows (or
    columns) times the scale, and the theorem does not apply, because it is for square factors.

    Args:
        shape: (m, n).
        depth: L, at least 2.
        scale: The theorem's epsilon, above 0.
        generator: A generator on the CPU.

    Raises:
        InputError: The depth or the scale is out of range.
    """
    return narrow_start(shape, min(shape), depth, scale, generator)


def narrow_start(shape: tuple[int, int], width: int, depth: int, scale: float, generator: torch.Generator) -> Chain:
    """Returns a factorization through layers of ``width``, every factor random and semi-orthogonal times ``scale``.

    Args:
        shape: (m, n).
        width: Width of every hidden layer, 1 to min(m, n); the counterpart of a compressed chain of rank r has width 2r.
        depth: L, at least 2.
        scale: Epsilon, above 0.
        generator: A generator on the CPU.

    Raises:
        InputError: A size is out of range.
    """
    checked_count(depth, "depth", 2)
    checked_number(scale, "init scale", above=True)
    checked_count(width, "width")
    rows, columns = shape
    sizes = [(width, columns), *[(width, width)] * (depth - 2), (rows, width)]
    factors = tuple(scale * semi_orthogonal(out, into, generator) for out, into in sizes)
    return Chain(factors, (1.0,) * depth)


def compressed_start(frames: Frames, depth: int, scale: float, gamma: float) -> Chain:
    """Returns the compressed factorization U W~_L ... W~_1 V^T with inner factors scale * I ([YAR24], section 3).

    Args:
        frames: U (m x 2r) and V (n x 2r).
        depth: Number of inner factors L, at least 2.
        scale: Epsilon, above 0.
        gamma: Discrepant rate of the outer factors, relative to the inner ones; 0 freezes them.

    Raises:
        InputError: A number is out of range.
    """
    checked_count(depth, "depth", 2)
    checked_number(scale, "init scale", above=True)
    checked_number(gamma, "gamma")
    width = frames.right.shape[1]
    core = scale * torch.eye(width, dtype=frames.right.dtype, device=frames.right.device)
    factors = (frames.right.T.clone(), *(core.clone() for _ in range(depth)), frames.left.clone())
    return Chain(factors, (gamma, *(1.0,) * depth, gamma), frames=True)


def gradients(chain: Chain, d_left: Tensor, d_first: Tensor | None) -> list[Tensor | None]:
    """Returns the gradient with respect to every factor, from the gradients with respect to left and first (f = left @ first).

    Args:
        chain: K factors.
        d_left: m x w, E first^T for the residual E.
        d_first: w x n, left^T E; None leaves the first factor out.

    Returns:
        One gradient for each factor; None for the first when ``d_first`` is None, and for a last factor of rate 0. All are new
        tensors.
    """
    upper = chain.factors[1:]
    below = [upper[0]]  # below[i] is upper[i] @ ... @ upper[0]
    for factor in upper[1:-1]:
        below.append(factor @ below[-1])
    found: list[Tensor | None] = []
    flowing = d_left
    for index in range(len(upper) - 1, 0, -1):
        frozen = index == len(upper) - 1 and chain.rates[-1] == 0
        found.append(None if frozen else flowing @ below[index - 1].T)
        flowing = upper[index].T @ flowing
    return [d_first, flowing, *reversed(found)]
