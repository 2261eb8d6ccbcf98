"""Least-squares weights for a layer that has lost some of its input channels.

With ``C = E[x x']`` over calibration activations and S the kept channels, the weights with the least mean squared error are

    W' = W C[:, S] (C[S, S] + lambda I)^-1

(the normal equations of OSSCAR, arXiv 2403.12983, and ZipLM, arXiv 2302.04089). The damping is relative to the mean of the diagonal of
``C[S, S]`` and pulls towards the kept columns of W, so that very strong damping gives plain pruning and not zero weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Judge(Protocol):
    """Held-out inputs of one kind, by which weights are judged."""

    @property
    def power(self) -> float:
        """Summed square of the goal, over all outputs."""
        ...

    def error(self, new_OS: Tensor) -> float:
        """Returns the summed squared error of weights on the kept channels."""
        ...


class JudgingRows:
    """Held-out inputs themselves: a few hundred rows judge weights in a fraction of the time that their second moments take.

    Args:
        weight_OI: Weights before pruning, (out, in); what they put out is the goal.
        kept: Indices of the kept channels, int64 (kept,), ascending.
        rows_NI: Inputs, float32 or float64 (rows, in).
    """

    def __init__(self, weight_OI: Tensor, kept: Tensor, rows_NI: Tensor) -> None:
        self._goal_NO = rows_NI @ weight_OI.to(rows_NI.dtype).T
        self._rows_NS = rows_NI[:, kept]
        self.power = float(self._goal_NO.square().sum(dtype=torch.float64))

    def error(self, new_OS: Tensor) -> float:
        """Returns the summed squared error of new weights, float64 (out, kept)."""
        missing_NO = torch.addmm(self._goal_NO, self._rows_NS, new_OS.to(self._rows_NS.dtype).T, alpha=-1.0)
        return float(missing_NO.square().sum(dtype=torch.float64))


class NormalEquations:
    """Normal equations for a layer's weights on its kept input channels.

    The solution does not depend on the scale of the moments, so sums serve as well as means. No copy of an (in, in) matrix is made,
    because that matrix determines the memory that re-fitting needs.

    Args:
        weight_OI: Weights before pruning, (out, in).
        kept: Indices of the kept channels, int64 (kept,), ascending.
    """

    def __init__(self, weight_OI: Tensor, kept: Tensor) -> None:
        self._weight_OI = weight_OI.double()
        self._kept = kept
        self._gram_SS = weight_OI.new_zeros(0)
        self._right_SO = weight_OI.new_zeros(0)
        self._power = 0.0

    @property
    def power(self) -> float:
        """Summed square of the goal, over all outputs: ``W C W'`` for the old output."""
        return self._power

    def add(self, second_II: Tensor) -> None:
        """Adds second moments of the inputs, float64 (in, in).

        Raises:
            InputError: The second moments are not finite.
        """
        right_OI = self._weight_OI @ second_II
        self.add_towards(second_II, right_OI, float((right_OI * self._weight_OI).sum()))

    def add_towards(self, second_II: Tensor, cross_OI: Tensor, power: float) -> None:
        """Adds second moments of the inputs with a goal of their own, in place of the old output.

        Args:
            second_II: ``x x'`` summed, float64 (in, in).
            cross_OI: ``z x'`` summed for the goals z, float64 (out, in).
            power: ``|z|^2`` summed.

        Raises:
            InputError: The moments are not finite.
        """
        if not math.isfinite(power):
            raise InputError("activations on the calibration text are not finite; use `dtype=float32` or other calibration text")
        self._gather(second_II[self._kept[:, None], self._kept], cross_OI[:, self._kept].T, power)

    def include(self, other: NormalEquations) -> None:
        """Adds the moments that other equations of the same weights and channels have seen."""
        self._gather(other._gram_SS.clone(), other._right_SO, other._power)

    def _gather(self, gram_SS: Tensor, right_SO: Tensor, power: float) -> None:
        first = not self._gram_SS.numel()
        self._gram_SS = gram_SS if first else self._gram_SS.add_(gram_SS)
        self._right_SO = right_SO if first else self._right_SO + right_SO
        self._power += power

    def solve(self, damping: float) -> Tensor:
        """Returns the weights on the kept channels, float64 (out, kept), for a ridge relative to the mean of the diagonal."""
        diagonal_S = self._gram_SS.diagonal()
        undamped_S = diagonal_S.clone()
        ridge = damping * undamped_S.mean().clamp_min(torch.finfo(torch.float64).tiny)
        right_SO = self._right_SO + ridge * self._weight_OI[:, self._kept].T
        diagonal_S += ridge
        try:
            factor = linalg.cholesky_if_positive(self._gram_SS)
            if factor is None:  # the damping is smaller than the rounding errors of the moments
                return linalg.least_squares(self._gram_SS, right_SO).T
            return torch.cholesky_solve(right_SO, factor).T
        finally:
            diagonal_S.copy_(undamped_S)

    def error(self, new_OS: Tensor) -> float:
        """Returns the summed squared error of new weights W' on what was added, ``|z|^2 - 2 z . W' x_S + |W' x_S|^2``; z is the goal."""
        return self._power + float(((new_OS @ self._gram_SS) * new_OS).sum()) - 2.0 * float((self._right_SO.T * new_OS).sum())


def reconstruct(weight_OI: Tensor, second_II: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Returns the least-squares weights on the kept channels.

    Args:
        weight_OI: Weights before pruning, (out, in).
        second_II: Second moments of the inputs, float64 (in, in).
        kept: Indices of the kept channels, int64 (kept,), ascending.
        damping: Ridge relative to the mean of the diagonal; above 0.

    Returns:
        float64 (out, kept).

    Raises:
        InputError: The second moments are not finite.
    """
    equations = NormalEquations(weight_OI, kept)
    equations.add(second_II)
    return equations.solve(damping)


def error(weight_OI: Tensor, second_II: Tensor, kept: Tensor, new_OS: Tensor) -> float:
    """Returns the mean squared error ``E |W x - W' x_S|^2`` of new weights W' on inputs with these second moments."""
    difference_OI = weight_OI.to(second_II).clone()
    difference_OI[:, kept] -= new_OS
    return float((difference_OI @ second_II).mul_(difference_OI).sum())


def best_damping(equations: NormalEquations, held_out: Sequence[Judge], dampings: Sequence[float] = DAMPINGS) -> float:
    """Returns the damping with the least error on the kind of held-out text that it fits worst.

    The error falls with the damping and then rises, so that it is followed downhill from the middle of the choices.

    Args:
        equations: Normal equations of the part of the calibration text that is fitted.
        held_out: Other text, one judge for each kind of it. With several, each counts by its error over the power of the old output
            on it, so that the kind that is fitted worst decides.
        dampings: The choices, ascending.
    """
    tiny = torch.finfo(torch.float64).tiny
    powers = [max(part.power, tiny) if len(held_out) > 1 else 1.0 for part in held_out]

    def worst(place: int) -> float:
        new_OS = equations.solve(dampings[place])
        return max(part.error(new_OS) / power for part, power in zip(held_out, powers, strict=True))

    best = len(dampings) // 2
    least = worst(best)
    for step in (-1, 1):
        start = best
        while 0 <= best + step < len(dampings):
            found = worst(best + step)
            if found >= least:
                break
            best, least = best + step, found
        if best != start:
            break
    return dampings[best]
