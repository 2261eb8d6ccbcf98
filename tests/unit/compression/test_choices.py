"""Choices of ranks against brute force and against what defines them; the budget is never exceeded."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from regraft.compression import RANK_CHOICES, Priced, factor_plan, factor_space, settle
from regraft.errors import InputError
from regraft.plans import FactorLayout, FactorPlan, FactorSpace, from_json, to_json

SHAPES = (("a.q_proj", 12, 16), ("a.up_proj", 20, 12), ("b.q_proj", 12, 16), ("b.up_proj", 20, 12))


def space(ratio: float = 0.3, layout: FactorLayout = "plain", align: int | None = 2, new_bias: int = 0, shapes=SHAPES) -> FactorSpace:
    generator = torch.Generator().manual_seed(3)
    priced: list[Priced] = []
    for index, (name, rows, columns) in enumerate(shapes):
        prices = torch.rand(min(rows, columns), generator=generator, dtype=torch.float64).sort(descending=True).values.pow(3) * (1 + index)
        damage = torch.cat([prices.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        priced.append(Priced(name, index // 2, rows, columns, new_bias, damage))
    held = sum(rows * columns for _, rows, columns in shapes)
    return factor_space(
        priced, fingerprint="f", method="fisher", unit="nats", layout=layout, parameters=held + 200, ratio=ratio, align=align
    )


@pytest.mark.parametrize("name", ["uniform", "type", "closed", "knapsack"])
@pytest.mark.parametrize("layout", ["plain", "pifa"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("new_bias", [0, 12])
def test_the_budget_is_hard_and_spent(name: str, layout: FactorLayout, ratio: float, new_bias: int) -> None:
    here = space(ratio, layout, new_bias=new_bias)
    ranks = RANK_CHOICES.get(name)(here)
    stored = sum(
        rows * columns if rank == min(rows, columns) else rank * (rows + columns - (rank if layout == "pifa" else 0)) + new_bias
        for rank, (_, rows, columns) in zip(ranks, SHAPES, strict=True)
    )
    assert stored == here.stored(ranks)
    assert here.dense - stored >= ratio * here.parameters
    assert all(rank in site.ranks for rank, site in zip(ranks, here.sites, strict=True))
    if name in ("closed", "knapsack"):  # no single step up fits any more that would lower the damage
        assert settle(here, ranks) == ranks


@pytest.mark.parametrize("layout", ["plain", "pifa"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_knapsack_is_the_best_there_is(layout: FactorLayout, ratio: float) -> None:
    here = space(ratio, layout)
    best = min(here.predicted(ranks) for ranks in product(*(site.ranks for site in here.sites)) if here.stored(ranks) <= here.budget)
    assert here.predicted(RANK_CHOICES.get("knapsack")(here)) == pytest.approx(best, rel=1e-9)


def test_water_filling_takes_the_largest_values_per_parameter() -> None:
    """Every term that is kept is worth more per parameter than every one that is dropped, up to the last step of rounding."""
    here = space(0.3, align=1)
    ranks = RANK_CHOICES.get("closed")(here)
    kept: list[float] = []
    dropped: list[float] = []
    for site, rank in zip(here.sites, ranks, strict=True):
        if rank == site.full_rank:
            continue
        place = site.ranks.index(rank)
        sides = site.rows + site.columns
        if place:
            kept.append((site.damage[place - 1] - site.damage[place]) / sides)
        if place + 2 < len(site.ranks):
            dropped.append((site.damage[place] - site.damage[place + 1]) / sides)
    assert len(kept) > 1
    assert min(kept) >= 0.8 * max(dropped)


def test_uniform_keeps_one_share() -> None:
    big = tuple((f"{index}.q_proj", 128, 128 + 64 * index) for index in range(4))
    here = space(0.3, align=1, shapes=big)
    ranks = RANK_CHOICES.get("uniform")(here)
    shares = [rank * (rows + columns) / (rows * columns) for rank, (_, rows, columns) in zip(ranks, big, strict=True)]
    assert max(shares) - min(shares) < 0.03


def test_kinds_share_one_share() -> None:
    big = tuple((f"{layer}.{kind}", 128, 128) for layer in range(3) for kind in ("q_proj", "up_proj"))
    ranks = RANK_CHOICES.get("type")(space(0.3, align=8, shapes=big))
    for kind in (0, 1):
        own = ranks[kind::2]
        assert max(own) - min(own) <= 24, own  # what is left over goes where it buys most


def test_prices_decide() -> None:
    """A layer whose ranks cost nothing gives way before one whose ranks are dear."""
    cheap = Priced("a.q_proj", 0, 16, 16, 0, torch.linspace(1e-6, 0, 17, dtype=torch.float64))
    dear = Priced("b.q_proj", 1, 16, 16, 0, torch.linspace(1.0, 0, 17, dtype=torch.float64))
    for name in ("type", "closed", "knapsack"):
        here = factor_space([cheap, dear], fingerprint="f", method="m", unit="nats", layout="plain", parameters=512, ratio=0.3, align=1)
        ranks = RANK_CHOICES.get(name)(here)
        if name != "type":  # both are of one kind
            assert ranks[0] < ranks[1] == 16


@pytest.mark.parametrize(("width", "step"), [(512, 8), (256, 8), (128, 4), (40, 1)])
def test_ranks_are_multiples_of_eight_where_there_are_enough_of_them(width: int, step: int) -> None:
    here = space(0.3, align=None, shapes=(("a.q_proj", width, 2 * width),))
    assert here.sites[0].ranks[:2] == (step, 2 * step)


@pytest.mark.parametrize(("ratio", "words"), [(0.95, r"ratio 0.95 cannot be met by any rank: .* at most 0\.\d+ of all")])
def test_a_ratio_that_no_rank_meets_is_refused(ratio: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        space(ratio)


def test_a_plan_says_what_is_stored_and_makes_the_round_trip() -> None:
    here = space(0.3)
    ranks = RANK_CHOICES.get("knapsack")(here)
    plan = factor_plan(here, ranks, "knapsack", 0.3, dict.fromkeys((name for name, _, _ in SHAPES), False))
    assert plan.achieved >= 0.3
    assert plan.parameters_after == 200 + here.stored(ranks)
    assert plan.predicted_nats == pytest.approx(here.predicted(ranks))
    assert from_json(FactorPlan, to_json(plan)) == plan
    with pytest.raises(InputError, match="above the budget"):
        factor_plan(here, [site.full_rank for site in here.sites], "none", 0.3, {})
