"""The rank vectors that a budget allows, and the best of them: against enumeration."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from regraft.allocation.fill import fill, improve, moved, moves, nearest, proportional_to, random_vectors
from regraft.allocation.spaces import rank_plan, rank_space
from regraft.errors import InputError, PlanError
from regraft.testing.planted import CHOICES, all_vectors, space_of

costs = some.lists(some.integers(1, 60), min_size=2, max_size=4)
seeds = some.integers(0, 2**16)


@pytest.mark.slow
@given(costs, seeds)
@settings(max_examples=40)
def test_fill_is_the_best_of_all_vectors(prices: list[int], seed: int) -> None:
    space, draw = space_of(prices), np.random.default_rng(seed)
    gains = draw.standard_normal((len(prices), len(CHOICES)))
    vectors = all_vectors(space)
    worth = [gains[np.arange(len(prices)), np.searchsorted(CHOICES, ranks)].sum() for ranks in vectors]
    found = fill(space, gains)
    assert space.holds(found)
    assert gains[np.arange(len(prices)), np.searchsorted(CHOICES, found)].sum() == pytest.approx(max(worth))


@given(some.lists(some.integers(10**6, 10**7), min_size=2, max_size=40), seeds, some.booleans())
@settings(max_examples=25)
def test_fill_holds_the_budget_where_costs_are_large_and_odd(prices: list[int], seed: int, rough: bool) -> None:
    space, draw = space_of(prices), np.random.default_rng(seed)
    gains = np.cumsum(np.sort(draw.random((len(prices), len(CHOICES))))[:, ::-1], axis=1)
    found = fill(space, gains, rough=rough)
    assert space.cost(found) <= space.budget
    up, down = moves(space, found)
    at = np.searchsorted(CHOICES, found)
    now = gains[np.arange(len(prices)), at].sum()
    for one, other in zip(up.tolist(), down.tolist(), strict=True):
        ranks = moved(space, found, one, other)
        assert space.holds(ranks)
        assert gains[np.arange(len(prices)), np.searchsorted(CHOICES, ranks)].sum() <= now + 1e-9


def test_moves_are_all_affordable_single_steps() -> None:
    space = space_of([3, 5, 4])
    for ranks in all_vectors(space):
        found = {moved(space, ranks, int(up), int(down)) for up, down in zip(*moves(space, ranks), strict=True)}
        expected = set()
        for other in all_vectors(space):
            steps = sorted(CHOICES.index(b) - CHOICES.index(a) for a, b in zip(ranks, other, strict=True) if a != b)
            if steps in ([1], [-1, 1]):
                expected.add(other)
        assert found == expected


def test_improve_never_goes_down() -> None:
    space, draw = space_of([3, 5, 4, 7]), np.random.default_rng(0)
    gains = draw.standard_normal((4, 4))
    for start in all_vectors(space)[::7]:
        end = improve(space, start, gains)
        value = [gains[np.arange(4), np.searchsorted(CHOICES, ranks)].sum() for ranks in (start, end)]
        assert value[1] >= value[0]
        assert space.holds(end)


def test_nearest_and_proportional_against_enumeration() -> None:
    space = space_of([3, 5, 4])
    wanted = [7.2, 3.1, 8.0]
    best = min(all_vectors(space), key=lambda ranks: sum((a - b) ** 2 for a, b in zip(ranks, wanted, strict=True)))
    assert nearest(space, wanted) == best
    assert proportional_to(space, np.array([1.0, 1.0, 1.0])) == (6, 6, 6)
    heavy = proportional_to(space, np.array([4.0, 1.0, 1.0]))
    assert heavy[0] == 8
    assert heavy[0] > max(heavy[1:])
    assert proportional_to(space, np.zeros(3)) == (6, 6, 6)


def test_random_vectors_hold_the_budget_and_differ() -> None:
    space = space_of([10, 11, 12, 13, 14, 15])
    found = random_vectors(space, 40, {(6,) * 6}, np.random.default_rng(3))
    assert len(set(found)) == 40
    assert (6,) * 6 not in found
    for ranks in found:
        assert space.holds(ranks)
    assert random_vectors(space, 40, {(6,) * 6}, np.random.default_rng(3)) == found
    assert any(sum(a != b for a, b in zip(one, other, strict=True)) > 3 for one, other in combinations(found, 2))


def test_a_slot_that_cannot_hold_a_rank_never_gets_it() -> None:
    space = space_of([3, 5, 4], limits=(4, 8, 8), uniform=4)
    for seed in range(20):
        found = fill(space, np.random.default_rng(seed).random((3, 4)))
        assert found[0] <= 4
        assert space.holds(found)


SLOTS = space_of([10, 20]).slots


def test_budgets_in_ranks_and_in_parameters_agree() -> None:
    by_rank, by_number = (rank_space("f", "layer", SLOTS, (4, 2, 6, 6), budget) for budget in ("r=4", 120))
    assert by_rank == by_number
    assert (by_rank.budget, by_rank.uniform, by_rank.choices) == (120, 4, (2, 4, 6))
    assert rank_space("f", "layer", SLOTS, (2, 4, 6), 150).uniform == 4


@pytest.mark.parametrize(
    ("choices", "budget", "said"),
    [
        ((2, 4), "30", "budget 30 is below the smallest plan, rank 2 everywhere, which has 60 parameters; raise `budget`"),
        ((2, 4), "r=2", "allows rank 2 everywhere and nothing else"),
        ((2, 4), "120", "not below the largest plan, which has 120 parameters"),
        ((2, 4), "r=3", "3 is not among the ranks 2,4; add it to `ranks`"),
        ((2, 9), "r=2", "rank 9 is above what any module can hold (8 in layers.0); take it out of `ranks`"),
        ((2, 4), "1e5", "budget '1e5' is neither r=RANK nor a number"),
        ((2,), "r=2", "leave nothing to choose"),
        ((0, 2), "r=2", "not positive"),
    ],
)
def test_budgets_and_ranks_that_cannot_be(choices: tuple[int, ...], budget: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        rank_space("f", "layer", SLOTS, choices, budget)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_smallest_rank_above_the_narrowest_slot_is_refused() -> None:
    narrow = (replace(SLOTS[0], limit=3), SLOTS[1])
    with pytest.raises(InputError, match=r"rank 4 is above the 3 that layers\.0 can hold; give a smaller one in `ranks`"):
        rank_space("f", "layer", narrow, (4, 6), "r=4")
    with pytest.raises(InputError, match=r"rank 4 is above the 3 that layers\.0 can hold; lower `budget`"):
        rank_space("f", "layer", narrow, (2, 4, 6), "r=4")


def test_slots_without_modules_are_refused() -> None:
    with pytest.raises(PlanError, match=r"layers\.0 has no module"):
        rank_space("f", "layer", (replace(SLOTS[0], modules=()), SLOTS[1]), (2, 4), "r=2")
    with pytest.raises(PlanError, match="nothing to give ranks to"):
        rank_space("f", "layer", (), (2, 4), "r=2")


def test_a_plan_is_of_its_space() -> None:
    space = rank_space("f", "layer", SLOTS, (2, 4, 6), "r=4")
    plan = rank_plan(space, (6, 2), "test")
    assert plan.ranks == {"layers.0.q": 6, "layers.1.q": 2}
    assert plan.trainable_parameters == 100
    for wrong in ((6, 6), (4,), (3, 4)):
        with pytest.raises(PlanError, match="not of this space"):
            rank_plan(space, wrong, "test")
