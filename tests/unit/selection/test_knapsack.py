"""The knapsack against an exhaustive search, and the properties that its answer must have."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import InputError, PlanError
from regraft.plans import Curve, Curves, Group, Groups, Scores
from regraft.selection import Budget, select

UNIT = 10
FLAT = Scores("f", "planted", {})


def problem(damages, units=4, fixed=40):
    """One FFN group a layer with ``units`` units, one parameter in ten a unit; damage at each size from 1 unit up."""
    groups = tuple(Group(f"layers.{i}.ffn", "ffn", i, units, (), UNIT) for i in range(len(damages)))
    curves = {
        group.name: Curve(tuple(range(1, units + 1)), tuple(row), tuple(UNIT * kept for kept in range(1, units + 1)))
        for group, row in zip(groups, damages, strict=True)
    }
    total = fixed + len(damages) * units * UNIT
    return Groups("f", "llama", len(damages), total, groups), Curves("f", "parameters", fixed, curves)


def solve(groups, curves, ratio, **options):
    scores = Scores("f", "planted", {group.name: tuple(range(group.units)) for group in groups.groups})
    budget = Budget(ratio, options.pop("shape", "per-layer"), tuple(range(groups.layers)), ("ffn",), align=1, curves=curves)
    plan = select("knapsack", groups, scores, budget, **options)
    kept = {cut.group: len(cut.kept) for cut in plan.cuts}
    return [kept.get(group.name, group.units) for group in groups.groups]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 5.0), min_size=3, max_size=3), min_size=2, max_size=4), st.integers(1, 6))
def test_no_other_choice_of_equal_size_does_less_damage(steps, gone):
    damages = [[sum(row[k:]) for k in range(3)] + [0.0] for row in steps]
    groups, curves = problem(damages)
    gone = min(gone, 3 * len(damages))
    kept = solve(groups, curves, gone * UNIT / groups.parameters)
    best = min(
        sum(row[size - 1] for row, size in zip(damages, sizes, strict=True))
        for sizes in product(range(1, 5), repeat=len(damages))
        if sum(4 - size for size in sizes) == gone
    )
    assert sum(4 - size for size in kept) == gone
    assert sum(row[size - 1] for row, size in zip(damages, kept, strict=True)) == pytest.approx(best)


def test_noise_in_a_curve_never_pays_for_cutting():
    groups, curves = problem([[3.0, 2.0, -1.0, 0.0], [0.3, 0.2, 0.1, 0.0]])
    assert solve(groups, curves, 2 * UNIT / groups.parameters) == [3, 3]


def test_uniform_shape_gives_every_layer_one_size():
    groups, curves = problem([[9.0, 8.0, 7.0, 0.0], [0.3, 0.2, 0.1, 0.0]])
    assert solve(groups, curves, 4 * UNIT / groups.parameters, shape="uniform") == [2, 2]


def test_a_budget_of_milliseconds_is_met_in_milliseconds():
    groups, _ = problem([[1.0, 0.5, 0.2, 0.0], [1.0, 0.5, 0.2, 0.0]])
    slow = Curve((1, 2, 3, 4), (1.0, 0.5, 0.2, 0.0), (1.0, 2.0, 3.0, 4.0))
    fast = Curve((1, 2, 3, 4), (1.0, 0.5, 0.2, 0.0), (0.1, 0.2, 0.3, 0.4))
    timed = Curves("f", "milliseconds", 0.6, {"layers.0.ffn": slow, "layers.1.ffn": fast})
    kept = solve(groups, timed, 0.4)
    assert kept[0] == 2, "only the slow layer can give 2 of 5 milliseconds"
    assert kept[1] == 4


def test_sizes_below_the_smallest_that_was_measured_count_as_what_they_are():
    """Damage and cost go on along the line: fewer units are neither free nor harmless."""
    groups, _ = problem([[0.0] * 4] * 2, units=16)
    measured = {group.name: Curve((4, 8, 16), (1.0, 0.4, 0.0), (40.0, 80.0, 160.0)) for group in groups.groups}
    measured["layers.1.ffn"] = Curve((4, 8, 16), (1.2, 0.4, 0.0), (40.0, 80.0, 160.0))
    curves = Curves("f", "parameters", 40, measured)
    gone = 26
    kept = solve(groups, curves, gone * UNIT / groups.parameters)
    assert sum(16 - size for size in kept) == gone
    assert kept == [1, 5], "the line of the first layer is less steep"


def test_curves_are_asked_for():
    groups, curves = problem([[1.0, 0.5, 0.2, 0.0]])
    budget = Budget(0.2, "per-layer", (0,), ("ffn",), 1)
    scores = Scores("f", "planted", {"layers.0.ffn": (1.0, 2.0, 3.0, 4.0)})
    with pytest.raises(PlanError, match="needs curves"):
        select("knapsack", groups, scores, budget)
    with pytest.raises(InputError, match="would leave a layer empty"):
        solve(groups, curves, 0.9)
