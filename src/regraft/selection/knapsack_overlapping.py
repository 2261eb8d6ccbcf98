"""Knapsack for overlapping cuts: heads and query heads, parts and whole layers, and the width of the residual stream.

Within a layer, the choices are all pairs of an attention size and a feed-forward size, and the removal of the layer. The width of the
stream changes all other costs. Therefore several widths are tried, and for each of them the rest is solved exactly, with costs counted by
:class:`regraft.groups.parameter_count.Ledger`. As in :mod:`regraft.selection.knapsack`, damages are assumed to add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from regraft.errors import InputError
from regraft.groups.parameter_count import Ledger
from regraft.numerics.multiple_choice import Table, solve
from regraft.plans import Curve, Group, Groups
from regraft.selection.budget import Budget, Kept
from regraft.selection.sizes import Choice, best_of, damage_at, sizes_of, widths_of


@dataclass(frozen=True)
class _Rows:
    """The choices of one table, each with its numbers of kept units."""

    kept: tuple[dict[str, int], ...]
    table: Table


def nested(groups: Groups, curves: Mapping[str, Curve], budget: Budget) -> Kept:
    """Returns how many units each group keeps.

    Args:
        groups: Groups of the model.
        curves: Damage against size for every group that may be cut; size 0 is the removal of a layer or part.
        budget: The amount to remove.

    Raises:
        InputError: No choice is close to the target.
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
        raise InputError(f"ratio {budget.ratio:g} is less than one step of the residual width; raise `ratio`, or lower `align`")
    smallest = min(group.unit_parameters * budget.step(group) for group in prunable)
    return best_of(found, smallest, groups.parameters).kept


def _inside(
    base: dict[str, int],
    damage: float,
    inner: Sequence[Group],
    ledger: Ledger,
    curves: Mapping[str, Curve],
    budget: Budget,
    target: float,
) -> Choice:
    """Chooses the sizes of all groups within the layers, for one width of the stream."""
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
    return Choice(kept, abs(ledger.left(base) - ledger.left(kept) - target), damage)


def _alternatives(
    here: Sequence[Group], base: dict[str, int], ledger: Ledger, curves: Mapping[str, Curve], budget: Budget, *, spare: Group | None
) -> list[list[_Rows]]:
    """Returns the alternatives for one layer: sizes of its parts, or its removal unless it is the spared layer."""
    kinds = {group.kind: group for group in here}
    parts: list[_Rows] = []
    for sizes, whole in ((("heads", "query_heads"), "attention"), (("mixer_heads",), None), (("vocabulary",), None), (("ffn",), "mlp")):
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
