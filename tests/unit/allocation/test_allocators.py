"""Every allocator: the contract, the budget, and an answer that is known otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from regraft.allocation import ALLOCATORS, ClosedForm, Ranks, confirm
from regraft.allocation.perceptron import PaperRankAdaptor
from regraft.errors import InputError, PlanError
from regraft.plans import RankSpace, RankTrial
from regraft.testing.planted import World, all_vectors, space_of

NAMES = sorted(ALLOCATORS.names())
LEARNERS = [name for name in NAMES if not isinstance(ALLOCATORS.get(name), ClosedForm)]
CLOSED = [name for name in NAMES if isinstance(ALLOCATORS.get(name), ClosedForm)]


def with_features(space: RankSpace, **features: list[float]) -> RankSpace:
    slots = [
        replace(slot, features={name.replace("_at_", "@"): values[place] for name, values in features.items()})
        for place, slot in enumerate(space.slots)
    ]
    return replace(space, slots=tuple(slots))


def curves(name: str, rows: list[list[float]]) -> dict[str, list[float]]:
    return {f"{name}_at_{rank}": [row[place] for row in rows] for place, rank in enumerate((2, 4, 6, 8))}


def test_the_list_is_what_the_settings_name() -> None:
    assert (
        sorted(["uniform", "proportional", "gradient", "eva", "adalora", "bayes", "bayes-tpe", "rankadaptor", "rankadaptor-paper"]) == NAMES
    )


@pytest.mark.parametrize(("name", "curve"), [("gradient", "gradient_energy"), ("eva", "eva"), ("adalora", "adalora")])
def test_curves_are_maximised_under_the_budget(name: str, curve: str) -> None:
    rows = np.cumsum(np.random.default_rng(1).random((3, 4)), axis=1)
    space = with_features(space_of([3, 5, 4]), **curves(curve, rows.tolist()))
    method = ALLOCATORS.get(name)
    assert isinstance(method, ClosedForm)
    best = max(all_vectors(space), key=lambda ranks: rows[np.arange(3), np.searchsorted((2, 4, 6, 8), ranks)].sum())
    assert method.allocate(space) == best


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "uniform"])
def test_what_is_not_measured_is_asked_for(name: str) -> None:
    method = ALLOCATORS.get(name)
    assert isinstance(method, ClosedForm)
    with pytest.raises(PlanError, match=r"(measure (it|one)|prune it) first"):
        method.allocate(space_of([3, 5, 4]))


def test_proportional_follows_the_damage() -> None:
    method = ALLOCATORS.get("proportional")
    assert isinstance(method, ClosedForm)
    pruned = with_features(space_of([4, 4, 4, 4]), share_pruned=[0.6, 0.2, 0.2, 0.2], importance_removed=[9.0, 1.0, 1.0, 1.0])
    ranks = method.allocate(pruned)
    assert ranks[0] == max(ranks) == 8
    assert method.allocate(with_features(space_of([4, 4, 4, 4]), share_pruned=[0.0] * 4)) == (6, 6, 6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_keep_the_contract(name: str) -> None:
    learner, world = ALLOCATORS.get(name), World(5, seed=2)
    assert not isinstance(learner, ClosedForm)
    assert learner.name == name
    history: list[RankTrial] = []
    for count in (1, 3, 4, 4):
        pending: list[Ranks] = [(2, 2, 2, 2, 2)]
        proposals = learner.propose(world.space, history, count, np.random.default_rng(7), pending)
        again = learner.propose(world.space, history, count, np.random.default_rng(7), pending)
        assert proposals == again
        assert 0 < len(proposals) <= count
        if not history:
            assert proposals[0].ranks == world.uniform
        vectors = [proposal.ranks for proposal in proposals]
        assert all(world.space.holds(ranks) for ranks in vectors)
        assert len({*vectors, *pending, *(trial.ranks for trial in history)}) == len(vectors) + 1 + len(history)
        history += [world.trial(ranks) for ranks in vectors]
    history.append(RankTrial((12, 2, 2, 2, 2), None, 1.0, 0.1, note="it diverged"))
    prediction = learner.predict(world.space, history, [world.uniform, history[3].ranks])
    assert prediction.gain_nats[0] == pytest.approx(0.0, abs=0.02)
    assert prediction.gain_nats.shape == prediction.deviation_nats.shape == (2,)
    assert (prediction.deviation_nats >= 0).all()
    later = learner.propose(world.space, history, 2, np.random.default_rng(7))
    assert (12, 2, 2, 2, 2) not in [proposal.ranks for proposal in later], "what failed is not tried again"


def test_the_papers_phases_have_its_names() -> None:
    learner, world = PaperRankAdaptor(close_nats=0.0), World(5, seed=2)
    vectors = [ranks for ranks in all_vectors(world.space) if ranks != world.uniform]
    history = [world.trial(ranks) for ranks in [world.uniform, *vectors[::50][:6]]]
    assert learner.phase(world.space, history) == "initialisation"
    history.append(world.trial(vectors[1]))
    assert learner.phase(world.space, history) == "incremental learning"
    history += [world.trial(ranks) for ranks in vectors[2:10]]
    assert learner.phase(world.space, history) == "convergence"
    assert learner.propose(world.space, history, 1, np.random.default_rng(0)) == ()


def test_confirmation_is_students_interval() -> None:
    space, found = space_of([4, 4]), (8, 4)
    draw = np.random.default_rng(0)
    for shift in (0.0, 0.05, -0.05):
        pairs = [(3.0 + 0.1 * seed, 3.0 + 0.1 * seed - shift + 0.01 * float(draw.standard_normal())) for seed in range(6)]
        trials = [
            RankTrial(ranks, loss, 0.5, 0.5, seed=seed)
            for seed, pair in enumerate(pairs)
            for ranks, loss in zip(((6, 6), found), pair, strict=True)
        ]
        got = confirm(space, [found], trials)
        test = ttest_1samp([a - b for a, b in pairs], 0.0).confidence_interval(0.95)
        (finalist,) = got.finalists
        assert (finalist.low_nats, finalist.high_nats) == pytest.approx((test.low, test.high))
        assert got.kept == (found if test.low > 0 else (6, 6))
        assert ("beat uniform by" in got.verdict) == (shift > 0)
        assert ("lose to uniform" in got.verdict) == (shift < 0)
    assert confirm(space, [], []).kept == (6, 6)
    assert confirm(space, [(6, 6)], []).kept == (6, 6)


def test_of_several_finalists_the_best_is_kept_and_they_share_noise_and_error() -> None:
    """The intervals are those of a regression on dummies of seeds and vectors, written out."""
    space, draw, vectors = space_of([4, 4]), np.random.default_rng(1), [(6, 6), (8, 4), (4, 8)]
    for shift in (0.2, 0.01):
        table = 3.0 + draw.standard_normal((6, 1)) + 0.02 * draw.standard_normal((6, 3)) - np.array([[0.0, shift / 2, shift]])
        trials = [RankTrial(ranks, table[seed, place], 0.5, 0.5, seed=seed) for seed in range(6) for place, ranks in enumerate(vectors)]
        seeds, places = (index.ravel() for index in np.indices(table.shape))
        design = np.concatenate([np.eye(6)[seeds], np.eye(3)[places][:, 1:]], axis=1)
        solution, squares, rank, _ = np.linalg.lstsq(design, table.ravel(), rcond=None)
        freedom = 18 - rank
        covariance = np.linalg.inv(design.T @ design) * squares[0] / freedom
        got = confirm(space, vectors[1:], trials)
        for finalist in got.finalists:
            place = 5 + vectors.index(finalist.ranks)
            half = t.ppf(1 - 0.05 / 4, freedom) * covariance[place, place] ** 0.5
            assert finalist.mean_nats == pytest.approx(-solution[place])
            assert (finalist.low_nats, finalist.high_nats) == pytest.approx((-solution[place] - half, -solution[place] + half))
        assert got.finalists[0].mean_nats > got.finalists[1].mean_nats
        assert got.kept == (got.finalists[0].ranks if got.finalists[0].low_nats > 0 else (6, 6))
        assert "95% interval" in got.verdict
        assert "best of 2 candidates" in got.verdict
        assert (got.kept == (4, 8)) == (shift == 0.2)


def test_uniform_is_kept_as_often_as_promised_where_nothing_is_to_gain() -> None:
    """Two finalists without any gain, 400 times: one of them is kept in at most 5 % of them, give or take the sampling."""
    space, draw, kept = space_of([4, 4]), np.random.default_rng(2), 0
    for _ in range(400):
        trials = [
            RankTrial(ranks, 3.0 + 0.01 * draw.standard_normal(), 1.0, 1.0, seed=seed)
            for seed in range(5)
            for ranks in ((6, 6), (8, 4), (4, 8))
        ]
        kept += confirm(space, [(8, 4), (4, 8)], trials).kept != (6, 6)
    assert kept <= 20


def test_a_finalist_that_diverges_is_out_and_a_seed_where_uniform_does_does_not_count() -> None:
    space, found, other = space_of([4, 4]), (8, 4), (4, 8)
    trials = [RankTrial((6, 6), 3.0 if seed else None, 1.0, 1.0, seed=seed) for seed in range(4)]
    trials += [RankTrial(found, 2.9 - 0.01 * seed if seed else None, 1.0, 1.0, seed=seed) for seed in range(4)]
    trials += [RankTrial(other, 2.0 if seed < 3 else None, 1.0, 1.0, seed=seed) for seed in range(4)]
    got = confirm(space, [found, other], trials)
    assert [finalist.ranks for finalist in got.finalists] == [found]
    assert got.finalists[0].gains_nats == pytest.approx((0.11, 0.12, 0.13))
    assert got.kept == found
    with pytest.raises(InputError, match="on 3 seeds, 0 of 1 candidates on all of them"):
        confirm(space, [other], trials)
    with pytest.raises(InputError, match="on 1 seeds"):
        confirm(space, [found], trials[:2] + trials[4:6])
