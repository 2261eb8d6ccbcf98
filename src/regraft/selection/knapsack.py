"""Widths by measured damage: the exact minimum of the summed damage under one budget, by dynamic programming.

Every group has a curve of damage against size (:class:`regraft.plans.Curve`), measured with only this group cut. The curve is
interpolated linearly between measured sizes, extrapolated linearly below the smallest one, and made to rise as units are removed. The
sum over groups is minimised over all choices of aligned sizes whose cost meets the budget: a multiple-choice knapsack, solved exactly on
a grid of costs. The only approximation is that damages add up. Therefore the damage is the divergence from the dense model, which is
closer to additive than a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from regraft.errors import InputError, PlanError
from regraft.groups.parameter_count import overlap
from regraft.numerics.multiple_choice import Table, solve
from regraft.plans import WHOLE, Curve, Curves, Group, Groups, Scores
from regraft.selection.budget import MOST_MISSED, SELECTORS, Budget, Kept, Selector
from regraft.selection.knapsack_overlapping import nested
from regraft.selection.knapsack_uniform import same_everywhere
from regraft.selection.sizes import at_sizes
from regraft.selection.uniform import alike


@dataclass(frozen=True)
class _Options:
    """The allowed sizes of one group: kept units, removed cost and damage of each."""

    group: Group
    kept: tuple[int, ...]
    removed: tuple[float, ...]
    damage: tuple[float, ...]


def knapsack(groups: Groups, scores: Scores, budget: Budget) -> Kept:
    """Returns how many units each group keeps, with the least summed damage of all choices that meet the budget.

    Raises:
        PlanError: The budget has no curves for these groups.
        InputError: The budget cannot be met.
    """
    curves = budget.curves
    if curves is None or curves.fingerprint != groups.fingerprint:
        raise PlanError("selection 'knapsack' needs curves of damage measured on this model; measure them first")
    prunable = budget.prunable(groups)
    depth = {group.kind for group in prunable} == {"layer"}  # removing only whole layers keeps equal layers equal
    if overlap(prunable) or (budget.shape == "uniform" and not depth and any(group.kind in WHOLE for group in prunable)):
        _refuse_overlapping(curves, budget)
        return (same_everywhere if budget.shape == "uniform" else nested)(groups, curves.values, budget)
    options = [_options(group, curves.values[group.name], budget) for group in prunable]
    total = curves.fixed_cost + sum(curve.cost[-1] for curve in curves.values.values())
    target = budget.ratio * total
    most = sum(option.removed[0] for option in options)
    if target > most:
        raise InputError(
            f"ratio {budget.ratio:g} would leave a layer empty: at most {most / total:.3f} of the {curves.unit} can go; "
            "lower `ratio` or widen `layers`"
        )
    if budget.shape == "uniform" and not depth:
        return _same_everywhere(options, target, total)
    return _solve(options, target)


def _refuse_overlapping(curves: Curves, budget: Budget) -> None:
    if curves.unit == "milliseconds":
        targets = ",".join(budget.targets)
        raise InputError(
            f"`targets={targets}` name parts that share weights, whose milliseconds cannot be measured one by one; "
            "use `budget=parameters` or `budget=bytes`"
        )


def _options(group: Group, curve: Curve, budget: Budget) -> _Options:
    """Returns the aligned sizes of a group, ascending, with the full size last."""
    step, floor = budget.step(group), budget.floor(group)
    kept = sorted({*range(floor, group.units, step), group.units})
    damage, cost = at_sizes(curve, kept)
    return _Options(group, tuple(kept), tuple((curve.cost[-1] - cost).tolist()), tuple(damage.tolist()))


def _solve(options: Sequence[_Options], target: float) -> dict[str, int]:
    """Chooses one size for every group."""
    chosen = solve([[[Table(option.removed, option.damage)]] for option in options], target)
    return {option.group.name: option.kept[rows[0]] for option, (_, rows) in zip(options, chosen, strict=True)}


def _same_everywhere(options: Sequence[_Options], target: float, total: float) -> dict[str, int]:
    """Returns one size for all groups of each kind: the least damage among the choices close to the target, or else the closest choice.

    Close is half of the smallest step, and at most a hundredth of the total.
    """
    by_name = {option.group.name: option for option in options}
    kinds = [[by_name[group.name] for group in lane] for lane in alike([option.group for option in options])]
    removed = reduce(np.add.outer, [np.sum([option.removed for option in members], axis=0) for members in kinds])
    damage = reduce(np.add.outer, [np.sum([option.damage for option in members], axis=0) for members in kinds])
    finest = min(sum(option.removed[-2] if len(option.removed) > 1 else math.inf for option in members) for members in kinds)
    missed = np.abs(removed - target)
    near = (missed <= min(0.5 * finest, MOST_MISSED * total)) & (removed > 0)
    chosen = np.argmin(np.where(near, damage, np.inf)) if near.any() else np.argmin(missed)
    indices = np.unravel_index(chosen, missed.shape)
    return {option.group.name: option.kept[int(index)] for members, index in zip(kinds, indices, strict=True) for option in members}


SELECTORS.include(Selector("knapsack", needs_curves=True, choose=knapsack))
