"""A plan in a few lines: equal layers share a row, and what loses nothing says why, for each selection that can decide so."""

from __future__ import annotations

import pytest

from regraft.pipelines.prune.summary import collapsed, plan_summary, why_kept
from regraft.plans import Cut, Group, Groups, PrunePlan

LAYERS = 30


def groups_of(heads: int, head_cost: int = 1000) -> Groups:
    made = [Group(f"layers.{layer}.heads", "heads", layer, heads, (), head_cost) for layer in range(LAYERS)]
    made += [Group(f"layers.{layer}.ffn", "ffn", layer, 64, (), 100) for layer in range(LAYERS)]
    return Groups("f", "llama", LAYERS, LAYERS * (heads * head_cost + 6400) + 1000, tuple(made))


def plan_of(groups: Groups, selection: str, ratio: float = 0.2, kind: str = "ffn", layers: int = LAYERS) -> PrunePlan:
    cuts = tuple(Cut(f"layers.{layer}.{kind}", (0,)) for layer in range(layers))
    return PrunePlan("f", "planted", selection, "uniform", ratio, 16, groups.parameters, groups.parameters // 2, cuts)


def test_equal_layers_are_one_row() -> None:
    groups = groups_of(3)
    rows = collapsed(plan_summary(groups, plan_of(groups, "uniform")))
    assert rows == [("layers.0-29.ffn", 64, 1), ("layers.0-29.heads", 3, 3)]
    apart = collapsed(plan_summary(groups, plan_of(groups, "uniform", layers=10)))
    assert apart == [("layers.0-9.ffn", 64, 1), ("layers.10-29.ffn", 64, 64), ("layers.0-29.heads", 3, 3)]


@pytest.mark.parametrize(
    ("heads", "cost", "selection", "ratio", "said"),
    [
        (1, 1000, "knapsack", 0.2, "key-value heads stay: every layer has one, and keeps it"),
        (
            2,
            9000,
            "knapsack",
            0.2,
            "key-value heads stay: the smallest step of every layer is 36.8% of the parameters, more than was asked for",
        ),
        (3, 1000, "knapsack", 0.2, "key-value heads stay: to cut feed-forward channels moves the predictions less, by measured damage"),
        (3, 1000, "global", 0.2, "key-value heads stay: feed-forward channels score lower for their parameters"),
        (3, 1000, "uniform", 0.2, "key-value heads stay: their share is less than one unit"),
        (3, 1000, "of-a-plug-in", 0.2, "key-value heads stay: selection of-a-plug-in chose feed-forward channels"),
    ],
)
def test_what_loses_nothing_says_why(heads: int, cost: int, selection: str, ratio: float, said: str) -> None:
    groups = groups_of(heads, cost)
    assert why_kept(groups, plan_of(groups, selection, ratio)) == (said,)


def test_what_is_cut_needs_no_reason() -> None:
    groups = groups_of(3)
    both = plan_of(groups, "uniform").cuts + plan_of(groups, "uniform", kind="heads").cuts
    plan = PrunePlan("f", "planted", "uniform", "uniform", 0.2, 16, groups.parameters, 1, both)
    assert why_kept(groups, plan) == ()
    assert why_kept(groups, plan_of(groups, "uniform", kind="heads")) == (
        "feed-forward channels stay: key-value heads meet the ratio alone",
    )
