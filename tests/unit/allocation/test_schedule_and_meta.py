"""What a search measures next; and what past searches teach the next one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regraft.allocation import Request, Rung, Schedule, finalists, next_request, winner
from regraft.allocation.fill import fill, random_vectors
from regraft.allocation.meta import add_to_store, foresight, read_store, train
from regraft.allocation.prior import SHIPPED, Prior, default_prior, load_prior, shipped_prior
from regraft.allocation.rankadaptor import RankAdaptor, first_vectors
from regraft.cli.app import run
from regraft.errors import DataError, InputError, PlanError
from regraft.plans import PastSearch, RankTrial
from regraft.testing.planted import World

LEARNER = RankAdaptor(default_prior())
SCHEDULE = Schedule((Rung(0.25, 6), Rung(0.5, 3), Rung(1.0, 2)), batch=3)


def answered(world: World, request: Request, history: list[RankTrial]) -> list[RankTrial]:
    trials = [replace(world.trial(proposal.ranks, request.fidelity), kind=request.kind) for proposal in request.proposals]
    if request.kind == "elastic":
        return [replace(trial, cost=0.01) for trial in trials]
    done = {trial.ranks: trial.fidelity for trial in history if trial.kind == "recovery"}
    return [replace(trial, cost=trial.fidelity - done.get(trial.ranks, 0.0)) for trial in trials]


def whole(world: World, schedule: Schedule = SCHEDULE) -> list[RankTrial]:
    history: list[RankTrial] = []
    while request := next_request(world.space, history, LEARNER, schedule, 1):
        history += answered(world, request, history)
    return history


def test_uniform_is_on_every_rung_and_the_cost_is_kept() -> None:
    world = World(5, seed=1)
    history = whole(world)
    for rung in SCHEDULE.rungs:
        level = [trial.ranks for trial in history if trial.fidelity == rung.fidelity]
        assert len(level) == len(set(level)) == rung.width
        assert world.uniform in level
    assert sum(trial.cost for trial in history) == pytest.approx(0.25 * 6 + 0.25 * 3 + 0.5 * 2)
    small = whole(World(5, seed=1), replace(SCHEDULE, cost_limit=2.0))
    assert sum(trial.cost for trial in small) <= 2.0


def test_half_a_round_on_disk_does_not_change_the_other_half() -> None:
    world = World(5, seed=1)
    first = next_request(world.space, [], LEARNER, SCHEDULE, 1)
    assert first is not None
    trials = answered(world, first, [])
    for kept in ([0], [2], [0, 2]):
        rest = next_request(world.space, [trials[place] for place in kept], LEARNER, SCHEDULE, 1)
        assert rest is not None
        assert rest.proposals == tuple(proposal for place, proposal in enumerate(first.proposals) if place not in kept)
    second = [next_request(world.space, order, LEARNER, SCHEDULE, 1) for order in (trials, trials[::-1])]
    assert second[0] == second[1]


@pytest.mark.slow
def test_survivors_are_chosen_and_the_winner_is_near_the_best() -> None:
    shares = []
    for seed in range(4):
        world = World(6, seed=seed, noise_nats=0.002)
        history = whole(world, Schedule((Rung(0.125, 8), Rung(0.25, 4), Rung(0.5, 2)), elastic=40))
        assert [trial.kind for trial in history[:40]] == ["elastic"] * 40
        found = winner(world.space, history, LEARNER)
        shares.append(world.gain(found) / world.gain(fill(world.space, world.table)))
    assert np.mean(shares) > 0.8


def test_finalists_are_what_was_found_and_the_best_closed_form_unless_it_surely_loses() -> None:
    world = World(5, seed=3, noise_nats=0.0005)
    history = whole(world)
    found = winner(world.space, history, LEARNER)
    others = sorted({trial.ranks for trial in history} - {found, world.uniform}, key=world.gain)
    worst, good = others[0], others[-1]
    assert world.gain(worst) < 0 < world.gain(good)
    assert finalists(world.space, history, LEARNER, found, [worst, good, world.uniform, found]) == (found, good)
    assert finalists(world.space, history, LEARNER, found, [worst]) == (found,)
    assert finalists(world.space, history, LEARNER, found, []) == (found,)
    assert finalists(world.space, history, LEARNER, world.uniform, [good]) == (good,)
    assert finalists(world.space, history, LEARNER, world.uniform, [worst]) == ()


def test_a_search_in_which_everything_failed_says_so() -> None:
    world = World(3)
    with pytest.raises(InputError, match="every trial failed"):
        winner(world.space, [RankTrial(world.uniform, None, 1.0, 0.1)], LEARNER)
    assert winner(world.space, [world.trial(world.uniform)], LEARNER) == world.uniform


@pytest.mark.parametrize(
    "wrong",
    [{"rungs": ()}, {"batch": 0}, {"elastic": -1}, {"rungs": (Rung(0.5, 1),)}, {"rungs": (Rung(0.5, 3), Rung(0.25, 2))}],
)
def test_schedules_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Schedule(**wrong)


def past(seed: int, slots: int = 8) -> PastSearch:
    world = World(slots, seed=seed, noise_nats=0.002)
    vectors = [world.uniform, *random_vectors(world.space, 11, {world.uniform}, np.random.default_rng(seed))]
    return PastSearch(world.space, tuple(world.trial(ranks) for ranks in vectors), "planted", 1000, 0.2)


@pytest.mark.slow
def test_past_searches_teach_what_features_are_worth() -> None:
    training = train([past(seed) for seed in range(8)])
    prior = training.prior
    weight = prior.mean[4 + prior.features.index("share_pruned")]
    assert weight > 0.3, "log amplitudes rise with the feature by 0.8 a deviation"
    assert abs(prior.mean[4 + prior.features.index("depth")]) < 0.3
    assert training.left_out.rank_correlation > 0.4
    assert training.left_out.r2 > training.untrained.r2 + 0.1
    gains = {"trained": 0.0, "default": 0.0}
    for seed in range(50, 58):
        world = World(8, seed=seed)
        trials = [world.trial(proposal.ranks, 0.25) for proposal in first_vectors(world.space)]
        for name, start in (("trained", prior), ("default", default_prior())):
            (proposal,) = RankAdaptor(start).propose(world.space, trials, 1, np.random.default_rng(0))
            gains[name] += world.gain(proposal.ranks) / world.gain(fill(world.space, world.table))
    assert gains["trained"] > gains["default"] + 0.5, "the first guess of eight searches"


@pytest.mark.slow
def test_what_is_foreseen_of_a_search() -> None:
    prior = train([past(seed) for seed in range(8)]).prior
    trained, untrained = ([foresight(past(seed), start).rank_correlation for seed in range(20, 26)] for start in (prior, default_prior()))
    assert float(np.mean(trained)) > float(np.mean(untrained)) + 0.1, "before the first trial"
    later = [foresight(past(seed), default_prior(), 8) for seed in range(20, 26)]
    assert [found.trials for found in later] == [4] * 6, "what has been seen is not predicted"
    assert float(np.mean([found.rank_correlation for found in later])) > float(np.mean(untrained)) + 0.2, "trials teach as well"
    assert foresight(past(20), prior, 12).trials == 0


@pytest.mark.slow
def test_the_command_trains_and_what_it_writes_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        add_to_store(tmp_path / "store", past(seed))
    add_to_store(tmp_path / "store", past(0))
    assert len(read_store(tmp_path / "store")) == 3
    assert run(["meta", "train", str(tmp_path / "store"), "--output", str(tmp_path / "prior")]) == 0
    assert "3 searches" in capsys.readouterr().out
    prior = load_prior(tmp_path / "prior")
    expected = train(read_store(tmp_path / "store")).prior
    assert prior.features == expected.features
    assert np.array_equal(prior.mean, expected.mean)
    assert np.array_equal(prior.covariance, expected.covariance)
    assert prior.made_from["searches"] == 3


def test_stores_and_priors_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["meta", "train", str(tmp_path / "none")], "is no folder"),
        (["meta", "tran", str(tmp_path)], "unknown action 'tran'"),
    ):
        assert run([*arguments, "--output", str(tmp_path / "prior")]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
    add_to_store(tmp_path / "store", past(0))
    with pytest.raises(DataError, match="a prior needs two: search more"):
        train(read_store(tmp_path / "store"))
    (tmp_path / "store" / "zzz.json").write_text("{}")
    with pytest.raises(PlanError, match=r"zzz\.json"):
        read_store(tmp_path / "store")
    default_prior().save(tmp_path / "whole")
    names = json.loads((tmp_path / "whole" / "prior.json").read_text())
    (tmp_path / "whole" / "prior.json").write_text(json.dumps(names | {"features": ["one too many"]}))
    with pytest.raises(PlanError, match="do not fit its names"):
        load_prior(tmp_path / "whole")
    (tmp_path / "whole" / "prior.safetensors").write_bytes(b"no")
    with pytest.raises(PlanError, match="cannot be read"):
        load_prior(tmp_path / "whole")


def test_the_shipped_prior_is_a_gaussian_over_known_names() -> None:
    prior: Prior = shipped_prior()
    assert (np.linalg.eigvalsh(prior.covariance) > 0).all()
    assert SHIPPED.is_dir() == bool(prior.made_from)
