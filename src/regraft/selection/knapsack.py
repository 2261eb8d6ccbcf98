"""Widths by measured damage: the exact minimum of the summed damage under one budget, by dynamic programming.

Every group comes with a curve of damage against size (:class:`regraft.plans.Curve`), measured with this group alone cut. Between
measured sizes the curve is interpolated linearly, and made to rise as units go. The sum over groups is minimised over all choices
of aligned sizes whose cost meets the budget: a multiple-choice knapsack, solved exactly on a grid of costs. The additive model is
the one approximation; it is why the curves are of the divergence to the dense model, which adds up better than losses do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError, PlanError
from regraft.plans import Curve, Curves, Group, Groups, Scores
from regraft.selection.budget import SELECTORS, Budget, Kept, Selector

# Costs are counted in steps of their greatest common divisor, or of this share of the target where that would be finer.
_FINEST = 20_000


@dataclass(frozen=True)
class _Options:
    """The sizes that one group may have: units kept, cost removed and damage of each."""

    group: Group
    kept: tuple[int, ...]
    removed: tuple[float, ...]
    damage: tuple[float, ...]


def knapsack(groups: Groups, scores: Scores, budget: Budget) -> Kept:
    """Returns how many units of each group stay, with the least summed damage of all choices that meet the budget.

    Raises:
        PlanError: There are no curves for these groups.
        InputError: The budget cannot be met.
    """
    curves = budget.curves
    if curves is None or curves.fingerprint != groups.fingerprint:
        raise PlanError("selection 'knapsack' needs curves of damage measured on this model; measure them first")
    prunable = budget.prunable(groups)
    options = [_options(group, curves.values[group.name], budget) for group in prunable]
    total = curves.fixed_cost + sum(curve.cost[-1] for curve in curves.values.values())
    target = budget.ratio * total
    most = sum(option.removed[0] for option in options)
    if target > most:
        raise InputError(
            f"ratio {budget.ratio:g} would leave a layer empty: at most {most / total:.3f} of the {curves.unit} can go; "
            "lower --ratio or widen --layers"
        )
    if budget.shape == "uniform":
        return _same_everywhere(options, target)
    return _solve(options, target)


def _options(group: Group, curve: Curve, budget: Budget) -> _Options:
    """Returns the aligned sizes of a group, ascending, the whole group last."""
    step, floor = budget.step(group), budget.floor(group)
    kept = sorted({*range(floor, group.units, step), group.units})
    damage = np.interp(kept, curve.kept, np.maximum.accumulate(np.asarray(curve.damage_nats)[::-1])[::-1])
    removed = curve.cost[-1] - np.interp(kept, curve.kept, curve.cost)
    return _Options(group, tuple(kept), tuple(removed.tolist()), tuple(damage.tolist()))


def _solve(options: Sequence[_Options], target: float) -> dict[str, int]:
    """Solves the multiple-choice knapsack on a grid of removed costs."""
    quantum = _quantum(options, target)
    steps = [[round(removed / quantum) for removed in option.removed] for option in options]
    smallest = min(step for row in steps for step in row if step > 0)
    goal = round(target / quantum)
    size = goal + max(max(row) for row in steps) + 1
    best: NDArray[np.float64] = np.full(size, np.inf)
    best[0] = 0.0
    choices: list[NDArray[np.int32]] = []
    for option, row in zip(options, steps, strict=True):
        after = np.full(size, np.inf)
        choice = np.zeros(size, dtype=np.int32)
        for index, (step, damage) in enumerate(zip(row, option.damage, strict=True)):
            candidate = np.full(size, np.inf)
            candidate[step:] = best[: size - step] + damage
            better = candidate < after
            after[better] = candidate[better]
            choice[better] = index
        best = after
        choices.append(choice)
    place = _best_near(best, goal, smallest)
    kept: dict[str, int] = {}
    for option, row, choice in zip(reversed(options), reversed(steps), reversed(choices), strict=True):
        index = int(choice[place])
        kept[option.group.name] = option.kept[index]
        place -= row[index]
    return kept


def _best_near(best: NDArray[np.float64], goal: int, smallest: int) -> int:
    """Returns the place of least damage within half the smallest step of the goal, or the nearest that can be reached."""
    low, high = max(0, goal - smallest // 2), min(len(best) - 1, goal + smallest // 2)
    window = best[low : high + 1]
    if np.isfinite(window).any():
        return low + int(window.argmin())
    reachable = np.flatnonzero(np.isfinite(best))
    return int(reachable[np.abs(reachable - goal).argmin()])


def _quantum(options: Sequence[_Options], target: float) -> float:
    """Returns the step of the grid: exact for whole costs as long as the grid stays small."""
    costs = [removed for option in options for removed in option.removed if removed > 0]
    if all(cost == int(cost) for cost in costs):
        exact = reduce(math.gcd, (int(cost) for cost in costs))
        if target / exact <= _FINEST:
            return float(exact)
    return target / _FINEST


def _same_everywhere(options: Sequence[_Options], target: float) -> dict[str, int]:
    """Returns one size for all groups of a kind: the least damage among the choices nearest to the target."""
    kinds = {kind: [option for option in options if option.group.kind == kind] for kind in dict.fromkeys(o.group.kind for o in options)}
    for kind, members in kinds.items():
        if len({option.kept for option in members}) > 1:
            raise InputError(f"--shape uniform needs layers of equal size, but the {kind} of this model differ; use --shape per-layer")
    found: list[tuple[float, float, dict[str, int]]] = []
    finest = math.inf
    for indices in product(*(range(len(members[0].kept)) for members in kinds.values())):
        pairs = [(option, index) for members, index in zip(kinds.values(), indices, strict=True) for option in members]
        removed = sum(option.removed[index] for option, index in pairs)
        damage = sum(option.damage[index] for option, index in pairs)
        found.append((abs(removed - target), damage, {option.group.name: option.kept[index] for option, index in pairs}))
    for members in kinds.values():
        finest = min(finest, sum(option.removed[-2] if len(option.removed) > 1 else math.inf for option in members))
    near = [choice for choice in found if choice[0] <= 0.5 * finest]
    if near:
        return min(near, key=lambda choice: choice[1])[2]
    return min(found, key=lambda choice: choice[0])[2]


def total_damage(curves: Curves, kept: Kept) -> float:
    """Returns the summed damage, in nats, that the curves promise for a choice of sizes."""
    return sum(float(np.interp(kept.get(name, curve.kept[-1]), curve.kept, curve.damage_nats)) for name, curve in curves.values.items())


SELECTORS.add("knapsack", Selector("knapsack", needs_curves=True, choose=knapsack))
