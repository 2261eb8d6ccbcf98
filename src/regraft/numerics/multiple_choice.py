"""The multiple-choice knapsack, solved exactly on a grid of costs by dynamic programming.

Stages follow one another; of each one alternative is taken, and of each table of that alternative one row. So a layer is one stage:
either a size for its attention and one for its feed-forward network, or no layer at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

# Costs are counted in steps of their greatest common divisor, or of this share of the target where that would be finer.
_FINEST = 20_000


@dataclass(frozen=True)
class Table:
    """Choices of which one is taken.

    Attributes:
        removed: Cost that each choice takes away.
        damage: That it does.
    """

    removed: tuple[float, ...]
    damage: tuple[float, ...]


Stage = Sequence[Sequence[Table]]
"""Alternatives, each a sequence of tables."""


@dataclass(frozen=True)
class _Walked:
    """Notes on one stage from the way forward: the alternative of each place, and the row for each alternative and table."""

    which: NDArray[np.int32]
    rows: list[list[NDArray[np.int32]]]
    steps: list[list[list[int]]]


def solve(stages: Sequence[Stage], target: float, *, at_least: bool = False) -> list[tuple[int, list[int]]]:
    """Returns the alternative and the rows of every stage with the least summed damage of all that remove the target.

    The target is met within half of the smallest cost, or as nearly as can be.

    Args:
        stages: What there is to choose.
        target: Cost to remove.
        at_least: Not less than the target, up to the grid of costs, however much more.
    """
    quantum = _quantum([removed for table in _tables(stages) for removed in table.removed], target)
    every = [[[[round(removed / quantum) for removed in table.removed] for table in tables] for tables in stage] for stage in stages]
    flat = [step for stage in every for tables in stage for row in tables for step in row]
    smallest = min((step for step in flat if step > 0), default=1)
    goal = math.ceil(target / quantum) if at_least else round(target / quantum)
    best: NDArray[np.float64] = np.full(max(goal, 0) + max(flat, default=0) + 1, np.inf)
    best[0] = 0.0
    walked: list[_Walked] = []
    for stage, steps in zip(stages, every, strict=True):
        best, noted = _through(stage, steps, best)
        walked.append(noted)
    place = _best_near(best, goal, 2 * len(best) if at_least else smallest, low=goal if at_least else 0)
    found: list[tuple[int, list[int]]] = []
    for noted in reversed(walked):
        alternative = int(noted.which[place])
        rows: list[int] = []
        for choice, steps in zip(reversed(noted.rows[alternative]), reversed(noted.steps[alternative]), strict=True):
            rows.append(int(choice[place]))
            place -= steps[rows[-1]]
        found.append((alternative, rows[::-1]))
    return found[::-1]


def _tables(stages: Sequence[Stage]) -> list[Table]:
    return [table for stage in stages for tables in stage for table in tables]


def _through(stage: Stage, steps: list[list[list[int]]], before: NDArray[np.float64]) -> tuple[NDArray[np.float64], _Walked]:
    """Takes the least damages at every cost through one stage."""
    after = np.full(before.shape, np.inf)
    which = np.zeros(before.shape, dtype=np.int32)
    rows: list[list[NDArray[np.int32]]] = []
    for index, (tables, own) in enumerate(zip(stage, steps, strict=True)):
        best = before
        choices: list[NDArray[np.int32]] = []
        for table, row in zip(tables, own, strict=True):
            best, choice = _add(table, row, best)
            choices.append(choice)
        better = best < after
        after[better] = best[better]
        which[better] = index
        rows.append(choices)
    return after, _Walked(which, rows, steps)


def _add(table: Table, steps: list[int], before: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Takes the least damages at every cost through one table."""
    after = np.full(before.shape, np.inf)
    choice = np.zeros(before.shape, dtype=np.int32)
    for index, (step, damage) in enumerate(zip(steps, table.damage, strict=True)):
        candidate = np.full(before.shape, np.inf)
        candidate[step:] = before[: before.shape[0] - step] + damage
        better = candidate < after
        after[better] = candidate[better]
        choice[better] = index
    return after, choice


def _best_near(best: NDArray[np.float64], goal: int, smallest: int, low: int = 0) -> int:
    """Returns the place of least damage within half the smallest step of the goal, or the nearest that can be reached.

    Args:
        best: Least damage at every place.
        goal: The place that is wanted.
        smallest: Step.
        low: Places below this do not count as near.
    """
    low, high = max(low, goal - smallest // 2), min(len(best) - 1, goal + smallest // 2)
    window = best[low : high + 1]
    if np.isfinite(window).any():
        return low + int(window.argmin())
    reachable = np.flatnonzero(np.isfinite(best))
    return int(reachable[np.abs(reachable - goal).argmin()])


def _quantum(costs: Sequence[float], target: float) -> float:
    """Returns the step of the grid: exact for whole costs as long as the grid stays small."""
    positive = [cost for cost in costs if cost > 0]
    if positive and all(cost == int(cost) for cost in positive):
        exact = reduce(math.gcd, (int(cost) for cost in positive))
        if target / exact <= _FINEST:
            return float(exact)
    return max(target, min(positive, default=1.0)) / _FINEST
