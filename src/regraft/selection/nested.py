"""The knapsack where cuts overlap: heads and query heads, parts and whole layers, all of them inside a stream of some width.

Within a layer every size of the attention goes with every size of the feed-forward network, or the layer goes. The width of the stream
changes what everything else costs: each of a row of widths is tried, and the rest is solved exactly for it, with costs counted by the
:class:`regraft.groups.ledger.Ledger`. Damages add up, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError
from regraft.groups.ledger import Ledger
from regraft.plans import Curve, Group, Groups
from regraft.selection.budget import Budget, Kept
from regraft.selection.dynamic import Table, solve

# Widths of the stream that are tried beside other cuts; what they leave open the others close.
MOST_WIDTHS = 17


@dataclass(frozen=True)
class _Rows:
    """The choices of one table, by the units that stay."""

    kept: tuple[dict[str, int], ...]
    table: Table


@dataclass(frozen=True)
class _Found:
    kept: dict[str, int]
    missed: float
    damage: float


def nested(groups: Groups, curves: Mapping[str, Curve], budget: Budget) -> Kept:
    """Returns how many units of each group stay.

    Args:
        groups: Of the model.
        curves: Damage against size of every group that may be cut; one without units is what it does to remove it.
        budget: How many parameters to remove.

    Raises:
        InputError: Nothing comes near the target.
    """
    prunable = budget.prunable(groups)
    ledger = Ledger(groups, [group.name for group in prunable])
    target = budget.ratio * groups.parameters
    stream = next((group for group in prunable if group.kind == "residual"), None)
    inner = [group for group in prunable if group.kind != "residual"]
    found = [_inside({}, 0.0, inner, ledger, curves, budget, target)] if stream is None else []
    for width in widths_of(stream, budget, alone=not inner) if stream is not None else ():
        assert stream is not None
        kept = {stream.name: width}
        removed = groups.parameters - ledger.left(kept)
        damage = damage_at(curves[stream.name], width)
        if removed <= target or not inner:
            found.append(_inside(kept, damage, inner, ledger, curves, budget, target - removed))
    if not found:
        raise InputError(f"ratio {budget.ratio:g} is less than one step of the residual width; raise --ratio, or lower --align")
    smallest = min(group.unit_parameters * budget.step(group) for group in prunable)
    near = [choice for choice in found if choice.missed <= 0.5 * smallest]
    return min(near, key=lambda choice: choice.damage).kept if near else min(found, key=lambda choice: choice.missed).kept


def _inside(
    base: dict[str, int],
    damage: float,
    inner: Sequence[Group],
    ledger: Ledger,
    curves: Mapping[str, Curve],
    budget: Budget,
    target: float,
) -> _Found:
    """Solves everything within the layers for one width of the stream."""
    by_layer: dict[int | None, list[Group]] = {}
    for group in inner:
        by_layer.setdefault(group.layer, []).append(group)
    dear = max((g for g in inner if g.kind == "layer"), key=lambda g: curves[g.name].damage_nats[0], default=None)
    stages = [_alternatives(here, base, ledger, curves, budget, spare=dear) for here in by_layer.values()]
    kept = dict(base)
    if target > 0:
        chosen = solve([[[rows.table for rows in tables] for tables in stage] for stage in stages], target)
        for stage, (alternative, indices) in zip(stages, chosen, strict=True):
            for rows, index in zip(stage[alternative], indices, strict=True):
                kept |= rows.kept[index]
                damage += rows.table.damage[index]
    return _Found(kept, abs(ledger.left(base) - ledger.left(kept) - target), damage)


def _alternatives(
    here: Sequence[Group], base: dict[str, int], ledger: Ledger, curves: Mapping[str, Curve], budget: Budget, *, spare: Group | None
) -> list[list[_Rows]]:
    """Returns what can be done to one layer: sizes for its parts, or that it goes, unless it is to be spared."""
    kinds = {group.kind: group for group in here}
    parts: list[_Rows] = []
    for sizes, whole in ((("heads", "query_heads"), "attention"), (("ffn",), "mlp")):
        widths = [kinds[kind] for kind in sizes if kind in kinds]
        choices = [dict(pairs) for pairs in product(*([(group.name, kept) for kept in sizes_of(group, budget)] for group in widths))]
        if whole in kinds:
            choices.append({kinds[whole].name: 0})
        if len(choices) > 1:
            parts.append(_rows(choices, base, ledger, curves))
    found = [parts]
    if "layer" in kinds and kinds["layer"] != spare:
        found.append([_rows([{kinds["layer"].name: 0}], base, ledger, curves)])
    return found


def _rows(choices: Sequence[dict[str, int]], base: dict[str, int], ledger: Ledger, curves: Mapping[str, Curve]) -> _Rows:
    removed = tuple(_lost(choice, base, ledger) for choice in choices)
    return _Rows(tuple(choices), Table(removed, tuple(sum(damage_at(curves[name], kept) for name, kept in c.items()) for c in choices)))


def _lost(choice: Mapping[str, int], base: dict[str, int], ledger: Ledger) -> float:
    kept, total = dict(base), 0.0
    for name, count in choice.items():
        total += ledger.lost(name, kept, count)
        kept[name] = count
    return total


def sizes_of(group: Group, budget: Budget) -> list[int]:
    """Returns the numbers of units that a group may keep, ascending; the whole group last."""
    return sorted({*range(budget.floor(group), group.units, budget.step(group)), group.units})


def widths_of(stream: Group, budget: Budget, *, alone: bool) -> list[int]:
    """Returns the widths of the stream that are tried: all where nothing else is cut, a spread of them beside other cuts."""
    sizes = sizes_of(stream, budget)
    if alone or len(sizes) <= MOST_WIDTHS:
        return sizes
    places = np.linspace(0, len(sizes) - 1, MOST_WIDTHS).round().astype(int)
    return [sizes[int(place)] for place in places]


def damage_at(curve: Curve, kept: int) -> float:
    """Returns the damage at a size: between measured sizes by a line, and never less for fewer units."""
    return float(at_sizes(curve, [kept])[0][0])


def at_sizes(curve: Curve, kept: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns damage and cost at each of some sizes: between measured ones by a line, below the smallest along the line that ends there.

    Damage never falls where units go.
    """
    sizes, cost = np.asarray(curve.kept, dtype=np.float64), np.asarray(curve.cost, dtype=np.float64)
    damage = np.maximum.accumulate(np.asarray(curve.damage_nats, dtype=np.float64)[::-1])[::-1]
    if len(sizes) > 1 and sizes[0] > 0:
        share = sizes[0] / (sizes[1] - sizes[0])
        damage = np.insert(damage, 0, damage[0] + share * (damage[0] - damage[1]))
        cost = np.insert(cost, 0, max(0.0, cost[0] - share * (cost[1] - cost[0])))
        sizes = np.insert(sizes, 0, 0.0)
    return np.interp(kept, sizes, damage), np.interp(kept, sizes, cost)
