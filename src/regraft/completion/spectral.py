"""Completion of noisy matrices: the compressed factorization with its end-to-end singular values shrunk.

Gradient descent on exact data needs no regulariser. Ratings are mostly noise. There the usual weight decay lambda ||W_l||^2 of L
factors penalises singular values by their power 2/L: for L = 3 it hardly changes large ones and removes small ones completely. That
costs accuracy (MovieLens small: test RMSE 0.853 at the best decay, 0.848 with the penalty below). We therefore minimise, over the
same factors,

    sum_observed (a_i b_j f_ij - y_ij)^2 / 2 + lambda ||f||_*,    f = U W_L ... W_1 V^T,

with U and V orthonormal, so that f has the spectrum of the small core. The gradient of the (smoothed) nuclear norm is taken at the
core: a soft threshold on the spectrum of f for every depth. The penalty needs two departures from the exact dynamics. U and V are
orthonormalised after each step, and the triangular factor goes into the neighbouring factor, so that f does not change. The scale of
the start is not tiny, because components below lambda would never grow.

The scales a_i = n_i^-alpha / c and b_j = n_j^-beta / c (n_i entries in row i, c so that their products have mean square one over
the entries) weight the penalty as [SAL10] weight the trace norm: rows with many entries pay more, because the plain norm would let
their factors grow at little cost.

References:
    [YAR24] Yaras, Wang, Balzano, Qu, arXiv 2406.04112, section 3 (the compressed factorization).
    [SAL10] Salakhutdinov, Srebro, "Collaborative filtering in a non-uniform world: learning with the weighted trace norm", NIPS 2010.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regraft.completion.entries import EntryList
from regraft.errors import TrainingError
from regraft.numerics import linalg
from regraft.numerics.chain import product
from regraft.numerics.checks import checked_count, checked_number, checked_rank
from regraft.numerics.frames import Frames, compact_frames

START = 0.3
"""Inner factors start at this times the L-th root of the top singular value."""

SAFETY = 0.5
"""Product of step size and largest curvature at the present spectrum; the limit of stability at momentum 0.9 is about 4."""

OUTER = 0.5
"""Rate of the frames, relative to the rate at which they would move as fast as the core."""

SMOOTHING = 0.01
"""Singular values below this share of the top one are shrunk by less than the full threshold."""

MOMENTUM = 0.9

CHECK_EVERY = 10


@dataclass(frozen=True)
class Scales:
    """Exponents alpha and beta of the numbers of entries of a row and of a column, which weight the penalty."""

    rows: float = 0.0
    columns: float = 0.0


class Factors(NamedTuple):
    """A completed matrix ``left @ right.T``."""

    left: Tensor
    """m x r."""
    right: Tensor
    """n x r."""


class SpectralProblem:
    """Residuals of ratings, ready to be fitted at any number of thresholds. The fits are independent of one another.

    Args:
        entries: Residuals (ratings without mean and biases).
        rank: r. The factorization is 2r wide; the result keeps its r leading components.
        depth: L, at least 2.
        scales: Exponents of the row and column scales.
        generator: A generator on the CPU.

    Attributes:
        top_value: Largest singular value of the scaled observed matrix. A threshold of this size or above gives a zero matrix.

    Raises:
        InputError: The rank or the depth is out of range.
    """

    def __init__(self, entries: EntryList, rank: int, depth: int, scales: Scales, generator: torch.Generator) -> None:
        checked_rank(rank, entries.shape[0], entries.shape[1])
        checked_count(depth, "depth", 2)
        self._entries, self._rank, self._depth = entries, rank, depth
        self._rows, self._columns = _scales_of(entries, scales)
        weights = (self._rows[entries.rows] * self._columns[entries.columns]).squeeze(1)
        triplets = entries.with_values(entries.values * weights).top_triplets(rank, generator)
        self._frames = compact_frames(triplets, generator)
        self.top_value = float(triplets.values[0])

    def fit(self, share: float, max_iterations: int = 300, tolerance: float = 1e-4) -> Factors:
        """Minimises at the threshold lambda = share * top_value.

        Args:
            share: The threshold as a share of the top value; 1 and above give a zero matrix.
            max_iterations: Largest number of steps.
            tolerance: The fit stops when ten steps lower the objective by less than this share of it.

        Raises:
            InputError: The share is negative.
            TrainingError: The objective is no longer finite.
        """
        checked_number(share, "threshold")
        if self.top_value == 0 or share >= 1:
            size = self._entries.shape
            return Factors(self._frames.left.new_zeros(size[0], self._rank), self._frames.right.new_zeros(size[1], self._rank))
        state = _State(self._frames, self._depth, START * self.top_value ** (1 / self._depth))
        before = math.inf
        for iteration in range(max_iterations):
            objective = self._advance(state, share * self.top_value)
            if not math.isfinite(objective):
                raise TrainingError(f"the fit diverged at step {iteration}; look for extreme values among the entries, or lower the rank")
            if iteration % CHECK_EVERY == 0:
                if abs(before - objective) <= tolerance * objective:
                    break
                before = objective
        core_left, values, core_right_h = linalg.svd(product(state.inner))
        kept = slice(0, self._rank)
        left = self._rows * (state.left @ (core_left[:, kept] * values[kept]))
        return Factors(left, self._columns * (state.right @ core_right_h[kept].T))

    def _advance(self, state: _State, threshold: float) -> float:
        """Makes one step of heavy ball; returns the objective before the step."""
        core = product(state.inner)
        core_left, values, core_right_h = linalg.svd(core)
        left, right = self._rows * (state.left @ core), self._columns * state.right
        residual = self._entries.at(left, right) - self._entries.values
        objective = 0.5 * float(residual.square().sum()) + threshold * float(values.sum())
        d_left = self._rows * self._entries.spread(residual, right)
        d_right = self._columns * self._entries.transpose_spread(residual, left)
        shrink = (core_left * (values / (values.square() + (SMOOTHING * self.top_value) ** 2).sqrt())) @ core_right_h
        inner = _inner_gradients(state.inner, state.left.T @ d_left + threshold * shrink)
        outer = [_tangent(state.left, d_left @ core.T), _tangent(state.right, d_right)]
        largest = max(self.top_value, float(values[0]))  # entries missing, the fit's spectrum grows beyond the data's
        state.move(inner, outer, SAFETY / (self._depth * largest ** (2 - 2 / self._depth)), OUTER * SAFETY / largest**2)
        return objective


class _State:
    """Orthonormal outer factors, the inner ones, and their velocities."""

    def __init__(self, frames: Frames, depth: int, scale: float) -> None:
        self.left, self.right = frames
        core = scale * torch.eye(frames.left.shape[1], dtype=torch.float64, device=frames.left.device)
        self.inner = [core.clone() for _ in range(depth)]
        self._velocities = [torch.zeros_like(factor) for factor in (*self.inner, self.left, self.right)]

    def move(self, inner: list[Tensor], outer: list[Tensor], step: float, outer_step: float) -> None:
        """Steps along the gradients, and moves the triangular factors of the orthonormalised frames into their neighbours."""
        for velocity, gradient in zip(self._velocities, [*inner, *outer], strict=True):
            velocity.mul_(MOMENTUM).add_(gradient)
        for factor, velocity in zip(self.inner, self._velocities, strict=False):
            factor.sub_(velocity, alpha=step)
        self.left, lost = _orthonormal(self.left - outer_step * self._velocities[-2])
        self.inner[-1] = lost @ self.inner[-1]
        self.right, lost = _orthonormal(self.right - outer_step * self._velocities[-1])
        self.inner[0] = self.inner[0] @ lost.T


def _scales_of(entries: EntryList, scales: Scales) -> tuple[Tensor, Tensor]:
    """Returns a (m x 1) and b (n x 1), scaled so that a_i^2 b_j^2 has mean one over the entries."""
    rows = torch.bincount(entries.rows, minlength=entries.shape[0]).clamp(min=1).double() ** -scales.rows
    columns = torch.bincount(entries.columns, minlength=entries.shape[1]).clamp(min=1).double() ** -scales.columns
    mean_square = float((rows[entries.rows] * columns[entries.columns]).square().mean())
    share = mean_square**0.25
    return (rows / share)[:, None], (columns / share)[:, None]


def _inner_gradients(factors: list[Tensor], d_core: Tensor) -> list[Tensor]:
    """Returns the gradient of each inner factor from that of their product."""
    below = [torch.eye(d_core.shape[0], dtype=d_core.dtype, device=d_core.device)]
    for factor in factors[:-1]:
        below.append(factor @ below[-1])
    found: list[Tensor] = []
    flowing = d_core
    for factor, before in zip(reversed(factors), reversed(below), strict=True):
        found.append(flowing @ before.T)
        flowing = factor.T @ flowing
    return found[::-1]


def _tangent(frame: Tensor, gradient: Tensor) -> Tensor:
    """Removes the part of a gradient that would only rotate the frame within its range: the core learns that part."""
    return gradient - frame @ (frame.T @ gradient)


def _orthonormal(near_frame: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a frame and an upper triangle whose product is the argument. Cholesky is accurate enough for a matrix close to a frame."""
    triangle = linalg.cholesky(near_frame.T @ near_frame).T
    return linalg.solve_right(near_frame, triangle), triangle
