"""Schedule of a search: which vectors are measured next, and for how long. Short recoveries come first; the best vectors get longer ones.

It is successive halving (Jamieson and Talwalkar, AISTATS 2016) over the share of the training steps, with three departures. Survivors are
chosen by the allocator's predictions from all trials of all levels, not by their last noisy measurement. Uniform always survives, because
every level needs it for paired comparisons. If an elastic adapter is trained, it scores many vectors by one forward pass each before the
first recovery.

Each decision is a pure function of the trials so far. The caller measures and stores the request of :func:`next_request` and calls it
again, until it returns None; then :func:`winner` and :func:`finalists` give the vectors to confirm. A search that was killed, also in the
middle of a request, resumes from the stored trials and ends with the same result. Costs are in units of one full recovery.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from regraft.allocation.contract import Learner, Proposal, Ranks
from regraft.allocation.fill import random_vectors
from regraft.errors import InputError
from regraft.plans import RankSpace, RankTrial

MOST_FINALISTS = 2
"""Largest number of vectors that :func:`finalists` returns."""

_ELASTIC_AT_RANDOM = 0.75  # share of random vectors among the elastic scores
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Rung:
    """One level of real recoveries.

    Attributes:
        fidelity: Number of trained steps as a share of a full recovery's, in (0, 1].
        width: Number of rank vectors that are measured at this level, uniform included.
    """

    fidelity: float
    width: int


@dataclass(frozen=True)
class Schedule:
    """Plan for spending the cost of a search.

    Attributes:
        rungs: Levels of rising fidelity. The first is filled with proposals, each other one with survivors of the previous one.
        elastic: Number of vectors that an elastic adapter scores before the first recovery; 0 for no elastic adapter.
        batch: Number of proposals between two re-fits of the performance model.
        cost_limit: Upper limit for the total cost.
    """

    rungs: tuple[Rung, ...] = (Rung(0.125, 12), Rung(0.25, 6), Rung(0.5, 3), Rung(1.0, 2))
    elastic: int = 0
    batch: int = 4
    cost_limit: float = 4.0

    def __post_init__(self) -> None:
        if not self.rungs or self.batch < 1 or self.elastic < 0:
            raise InputError("a schedule needs at least one rung and one proposal a round")
        if any(not 0 < rung.fidelity <= 1 or rung.width < 2 for rung in self.rungs):
            raise InputError("every rung needs a fidelity in (0, 1] and at least two vectors, uniform and another; raise its width")
        if any(low.fidelity >= high.fidelity or low.width < high.width for low, high in pairwise(self.rungs)):
            raise InputError("rungs must rise in fidelity and not in width; sort them")


@dataclass(frozen=True)
class Request:
    """Rank vectors to measure together, on the same batches and from the same initial values.

    Attributes:
        proposals: The vectors with their origins.
        fidelity: Number of trained steps as a share of a full recovery's; 1 for elastic scores.
        kind: Kind of the measurement: a real recovery, or a forward pass of the elastic adapter.
        cost: Expected cost, in units of one full recovery; 0 for elastic scores, whose cost is only known from the trials.
    """

    proposals: tuple[Proposal, ...]
    fidelity: float
    kind: Literal["recovery", "elastic"]
    cost: float


def next_request(space: RankSpace, history: Sequence[RankTrial], learner: Learner, schedule: Schedule, seed: int = 0) -> Request | None:
    """Returns the next vectors to measure, or None when the schedule is finished or the cost is spent.

    Args:
        space: Space of the search.
        history: All trials so far, with failed ones, in the order of the requests; the order inside a request does not matter.
        learner: Allocator that proposes and predicts.
        schedule: Plan for spending the cost.
        seed: Seed of the proposals.
    """
    left = schedule.cost_limit - sum(trial.cost for trial in history) + _ROUNDING
    if left <= 0:
        return None
    missing = _elastic(space, [trial for trial in history if trial.kind == "elastic"], learner, schedule, seed)
    if missing:
        return Request(missing, 1.0, "elastic", 0.0)
    for place, rung in enumerate(schedule.rungs):
        below = [trial for trial in history if trial.kind == "elastic" or trial.fidelity < rung.fidelity]
        level = [trial for trial in history if trial.kind == "recovery" and trial.fidelity == rung.fidelity]
        if place == 0:
            missing = _round(space, below, level, learner, schedule.batch, rung.width, seed)
        else:
            there = {trial.ranks for trial in level}
            wanted = _promoted(space, below, learner, schedule, place)
            missing = tuple(proposal for proposal in wanted if proposal.ranks not in there)
        if missing:
            return _affordable(missing, rung, below, left, alone=not level)
    return None


def winner(space: RankSpace, history: Sequence[RankTrial], learner: Learner) -> Ranks:
    """Returns the vector with the best prediction among those recovered for longest; uniform if none is predicted to beat it.

    Raises:
        InputError: Every recovery failed.
    """
    done = [trial for trial in history if trial.kind == "recovery" and trial.loss_nats is not None]
    if not done:
        why = next((trial.note for trial in history if trial.note), "no trial was measured")
        raise InputError(
            f"no rank vector could be recovered: every trial failed, the first one since: {why}; try a lower `lr`, or fewer `workers` "
            "where memory ran out, and a new `output`"
        )
    longest = max(trial.fidelity for trial in done)
    vectors = sorted({trial.ranks for trial in done if trial.fidelity == longest})
    gains = learner.predict(space, history, vectors).gain_nats
    best = int(np.argmax(gains))
    return vectors[best] if gains[best] > 0 else space.uniform_ranks


def finalists(
    space: RankSpace, history: Sequence[RankTrial], learner: Learner, found: Ranks, closed_forms: Collection[Ranks]
) -> tuple[Ranks, ...]:
    """Returns the vectors to compare with uniform on fresh seeds: the one found, and the best of the closed forms.

    A closed form was not chosen for its measurements, so that selection does not favour it; and the difference of the two in one search is
    often noise. It is left out when it is predicted to lose by more than the model's uncertainty.

    Args:
        space: Space of the search.
        history: All trials.
        learner: Allocator that predicts.
        found: The result of :func:`winner`.
        closed_forms: Vectors of closed forms that were recovered.
    """
    uniform = space.uniform_ranks
    others = sorted(set(closed_forms) - {uniform, found})
    chosen = [found] if found != uniform else []
    if others:
        predicted = learner.predict(space, history, others)
        best = int(np.argmax(predicted.gain_nats))
        if predicted.gain_nats[best] + predicted.deviation_nats[best] > 0:
            chosen.append(others[best])
    return tuple(chosen)


def _elastic(space: RankSpace, scored: Sequence[RankTrial], learner: Learner, schedule: Schedule, seed: int) -> tuple[Proposal, ...]:
    """Returns the vectors still to be scored by the elastic adapter: uniform and random ones, which vary every slot, then proposals."""
    if not schedule.elastic:
        return ()
    uniform = space.uniform_ranks
    drawn = random_vectors(space, round(_ELASTIC_AT_RANDOM * schedule.elastic) - 1, {uniform}, np.random.default_rng((seed, 0, 0)))
    design = [Proposal(uniform, "uniform"), *(Proposal(ranks, "random") for ranks in drawn)]
    if len(scored) >= len(design):
        before, scored = scored[: len(design)], scored[len(design) :]
        taken = [trial.ranks for trial in before]
        design = learner.propose(space, before, schedule.elastic - len(before), np.random.default_rng((seed, 0, 1)), taken)
    there = {trial.ranks for trial in scored}
    return tuple(proposal for proposal in design if proposal.ranks not in there)


def _round(
    space: RankSpace,
    below: Sequence[RankTrial],
    level: Sequence[RankTrial],
    learner: Learner,
    batch: int,
    width: int,
    seed: int,
) -> tuple[Proposal, ...]:
    """Returns the vectors of the present round of proposals that are not measured yet; none when the level is full.

    A round is proposed from complete rounds only, with its own random numbers, so that a half-measured round does not change its rest.
    """
    rounds = len(level) // batch
    count = min(batch, width - rounds * batch)
    if count < 1:
        return ()
    before = [*below, *level[: rounds * batch]]
    taken = [trial.ranks for trial in level[: rounds * batch]]
    there = {trial.ranks for trial in level[rounds * batch :]}
    proposals = learner.propose(space, before, count, np.random.default_rng((seed, 1, rounds)), taken)
    return tuple(proposal for proposal in proposals if proposal.ranks not in there)


def _promoted(space: RankSpace, below: Sequence[RankTrial], learner: Learner, schedule: Schedule, place: int) -> list[Proposal]:
    """Returns the vectors of a higher rung: uniform and the best survivors of the rung before."""
    rung, fidelity = schedule.rungs[place], schedule.rungs[place - 1].fidelity
    uniform = space.uniform_ranks
    passed = {trial.ranks for trial in below if trial.kind == "recovery" and trial.fidelity == fidelity and trial.loss_nats is not None}
    others = sorted(passed - {uniform})
    gains = learner.predict(space, below, others).gain_nats if others else np.zeros(0)
    order = sorted(range(len(others)), key=lambda place: -float(gains[place]))
    survivors = [Proposal(others[place], "survivor") for place in order[: rung.width - 1]]
    return [Proposal(uniform, "uniform"), *survivors]


def _affordable(missing: Sequence[Proposal], rung: Rung, below: Sequence[RankTrial], left: float, *, alone: bool) -> Request | None:
    """Returns as many of the missing vectors as the cost limit allows, in order; None if only uniform would be left."""
    kept: list[Proposal] = []
    cost = 0.0
    for proposal in missing:
        lower = [trial for trial in below if trial.kind == "recovery" and trial.ranks == proposal.ranks]
        reached = [trial.fidelity for trial in lower if trial.loss_nats is not None]
        further = rung.fidelity - max(reached, default=0.0)
        if cost + further > left:
            break
        cost += further
        kept.append(proposal)
    return Request(tuple(kept), rung.fidelity, "recovery", cost) if len(kept) > (1 if alone else 0) else None
