"""Knapsack for the shape ``uniform`` with overlapping cuts or removed layers.

Every kind has one size in all layers, so that the choices are few and can be tried one by one. In each, the kind with the smallest units
(the feed-forward width, if it is a target) closes the gap to the target. The result is the choice with the least summed damage among
those that meet the target; damages are assumed to add up, as in :mod:`regraft.selection.knapsack`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from regraft.groups.parameter_count import Ledger
from regraft.plans import Curve, Group, Groups
from regraft.selection.budget import Budget, Kept
from regraft.selection.sizes import Choice, best_of, damage_at, sizes_of, widths_of
from regraft.selection.uniform import FINEST_FIRST, alike


def same_everywhere(groups: Groups, curves: Mapping[str, Curve], budget: Budget) -> Kept:
    """Returns how many units each group keeps; the number is the same for all groups of a kind in the kept layers.

    Args:
        groups: Groups of the model.
        curves: Damage against size for every group that may be cut.
        budget: The amount to remove.

    Raises:
        InputError: The layers already have different sizes.
    """
    prunable = budget.prunable(groups)
    ledger = Ledger(groups, [group.name for group in prunable])
    goal = groups.parameters * (1.0 - budget.ratio)
    layers = [group for group in prunable if group.kind == "layer"]
    lanes = alike([group for group in prunable if group.kind != "layer"])
    closing = next((lane for kind in FINEST_FIRST for lane in lanes if lane[0].kind == kind), None)
    coarse = [_sizes(lane, budget) for lane in lanes if lane is not closing]
    found: list[Choice] = []
    for sizes in product(_depths(layers, curves, groups.layers), *coarse):
        base = {name: count for part in sizes for name, count in part.items()}
        found += [_choice(groups, base | fine, ledger, curves, goal) for fine in _closings(closing, base, ledger, budget, goal)]
    return best_of(found, _smallest(closing, budget), groups.parameters).kept


def _depths(layers: Sequence[Group], curves: Mapping[str, Curve], total: int) -> list[dict[str, int]]:
    """Returns the removals of no layer, of the least harmful layer, of the two least harmful ones, and so on; one layer is kept."""
    ranked = sorted(layers, key=lambda group: curves[group.name].damage_nats[0])
    return [{group.name: 0 for group in ranked[:count]} for count in range(min(len(layers), total - 1) + 1)]


def _sizes(lane: tuple[Group, ...], budget: Budget) -> list[dict[str, int]]:
    sizes = widths_of(lane[0], budget, alone=False) if lane[0].kind in ("residual", "vocabulary") else sizes_of(lane[0], budget)
    return [{group.name: size for group in lane} for size in sizes]


def _closings(lane: tuple[Group, ...] | None, base: Kept, ledger: Ledger, budget: Budget, goal: float) -> Iterator[dict[str, int]]:
    """Yields the sizes of the closing kind just above and just below the goal, and the largest size that still meets it."""
    if lane is None:
        yield {}
        return
    sizes = sizes_of(lane[0], budget)
    slack = 0.5 * _smallest(lane, budget)

    def excess(place: int) -> float:
        return ledger.left({**base, **{group.name: sizes[place] for group in lane}}) - goal

    places = {0, *(bisect_right(range(len(sizes)), bound, key=excess) - 1 for bound in (0.0, slack))}
    places.add(min(len(sizes) - 1, bisect_right(range(len(sizes)), 0.0, key=excess)))
    for place in sorted(place for place in places if place >= 0):
        yield {group.name: sizes[place] for group in lane}


def _choice(groups: Groups, kept: dict[str, int], ledger: Ledger, curves: Mapping[str, Curve], goal: float) -> Choice:
    named = groups.named()
    gone = {named[name].layer for name, count in kept.items() if named[name].kind == "layer" and not count}
    there = [name for name in kept if named[name].kind == "layer" or named[name].layer not in gone]
    return Choice(kept, abs(ledger.left(kept) - goal), sum(damage_at(curves[name], kept[name]) for name in there))


def _smallest(lane: tuple[Group, ...] | None, budget: Budget) -> float:
    return sum(group.unit_parameters for group in lane) * budget.step(lane[0]) if lane else 0.0
