"""Checks that every selector must pass."""

from __future__ import annotations

from itertools import product

import torch

from regraft.groups.discover import discover
from regraft.groups.parameter_count import Ledger
from regraft.plans import Curve, Curves, Groups, Scores, Shape
from regraft.selection import Budget, Selector
from regraft.testing.require import generators_left_alone, require
from regraft.testing.toys import tiny_llama

KINDS = ("heads", "ffn")
SHAPES: tuple[Shape, ...] = ("per-layer", "uniform")


def check_selector(selector: Selector) -> None:
    """Checks a selector on the heads and feed-forward channels of a tiny Llama with random scores and damages.

    For both shapes, two ratios and two alignments:

    1. Every number that it gives is of a group that may be cut, a multiple of the alignment or all units, and leaves a unit in each layer.
    2. The share is met to one aligned step of all feed-forward widths.
    3. ``uniform`` shapes have the same widths in every layer.
    4. A layer outside the budget is whole.
    5. The same arguments give the same answer, and the global generators are left alone.

    Raises:
        NonconformingError: With what the selector did.
    """
    who = f"selector '{selector.name}'"
    groups = discover(tiny_llama(), KINDS)
    draw = torch.Generator().manual_seed(2)
    scores = Scores(groups.fingerprint, "planted", {g.name: tuple(torch.rand(g.units, generator=draw).tolist()) for g in groups.groups})
    curves = _curves(groups, draw) if selector.needs_curves else None
    for shape, ratio, align, layers in product(SHAPES, (0.15, 0.3), (1, 8), ((0, 1, 2), (1, 2))):
        budget = Budget(ratio, shape, layers, KINDS, align, curves)
        with generators_left_alone(who):
            kept = dict(selector.choose(groups, scores, budget))
        case = f"{who}, {shape}, ratio {ratio:g}, alignment {align}, layers {list(layers)}"
        require(dict(selector.choose(groups, scores, budget)) == kept, f"{case}: another answer the second time")
        _check_numbers(case, kept, groups, budget)
        left = Ledger(groups, [group.name for group in groups.groups]).left(kept)
        step = align * sum(group.unit_parameters for group in groups.of("ffn"))
        missed = abs(groups.parameters - left - ratio * groups.parameters)
        require(missed <= step, f"{case}: the share is missed by {missed:.0f} parameters, more than one step of {step}")


def _check_numbers(case: str, kept: dict[str, int], groups: Groups, budget: Budget) -> None:
    prunable = {group.name: group for group in budget.prunable(groups)}
    for name, count in kept.items():
        require(name in groups.named(), f"{case}: there is no group '{name}'")
        units = groups.named()[name].units
        require(name in prunable or count == units, f"{case}: '{name}' may not be cut")
        if name in prunable:
            step, floor = budget.step(prunable[name]), budget.floor(prunable[name])
            require(floor <= count <= units, f"{case}: '{name}' keeps {count} of {units} units, the fewest allowed are {floor}")
            require(count == units or count % step == 0, f"{case}: '{name}' keeps {count} units, which is no multiple of {step}")
    if budget.shape == "uniform" and len(budget.layers) == groups.layers:
        for kind in KINDS:
            counts = {kept.get(group.name, group.units) for group in groups.of(kind)}
            require(len(counts) == 1, f"{case}: layers keep {sorted(counts)} units of kind {kind}")


def _curves(groups: Groups, draw: torch.Generator) -> Curves:
    """Plants a damage that falls with the units that stay, at every number of them."""
    values: dict[str, Curve] = {}
    for group in groups.groups:
        kept = tuple(range(1, group.units + 1))
        steps = torch.rand(group.units - 1, generator=draw)
        damage = (*steps.flip(0).cumsum(0).flip(0).tolist(), 0.0)
        values[group.name] = Curve(kept, damage, tuple(float(count * group.unit_parameters) for count in kept))
    fixed = groups.parameters - sum(group.units * group.unit_parameters for group in groups.groups)
    return Curves(groups.fingerprint, "parameters", float(fixed), values)
