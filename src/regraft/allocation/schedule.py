"""What a search measures next, and for how long: cheap short recoveries first, survivors get more.

Successive halving (Jamieson and Talwalkar, AISTATS 2016) over the share of the training steps, with three departures. Survivors are
chosen by what the allocator predicts from all trials of all levels, not by their last noisy measurement. Uniform always survives, so
that every level has the partner of its paired comparisons. And where an elastic adapter is trained, it scores many vectors by a
forward pass each before the first recovery.

Deciding is a pure function of the trials so far: :func:`next_request` is called, its request is measured and stored, and it is called
again, until it has nothing more; :func:`winner` and :func:`finalists` then say which vectors to confirm. A search that was killed, in
the middle of a request as well, goes on from the stored trials to the same end. Costs are in units of one full recovery.
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
"""How many vectors :func:`finalists` names at most."""

_ELASTIC_AT_RANDOM = 0.75  # share of the elastic scores
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Rung:
    """One level of real recoveries.

    Attributes:
        fidelity: Share of a full recovery's steps, in (0, 1].
        width: How many rank vectors are measured at it, uniform among them.
        fresh: How many of them are new proposals, which start from nothing, in place of survivors of the rung before.
    """

    fidelity: float
    width: int
    fresh: int = 0


@dataclass(frozen=True)
class Schedule:
    """How a search spends its cost.

    Attributes:
        rungs: With rising fidelity. The first is filled with proposals; the others with the survivors of the one before.
        elastic: How many vectors an elastic adapter scores before the first recovery; 0: there is none.
        batch: How many proposals are made between two refits of the performance model.
        cost_limit: Nothing is asked for that would cost more than this in all.
        continued: Whether a survivor goes on from where it stopped (and pays for the further steps alone) or starts again.
    """

    rungs: tuple[Rung, ...] = (Rung(0.125, 12), Rung(0.25, 6), Rung(0.5, 3), Rung(1.0, 2))
    elastic: int = 0
    batch: int = 4
    cost_limit: float = 4.0
    continued: bool = True

    def __post_init__(self) -> None:
        if not self.rungs or self.batch < 1 or self.elastic < 0:
            raise InputError("a schedule needs at least one rung and one proposal a round")
        if any(not 0 < rung.fidelity <= 1 or rung.width < 2 or not 0 <= rung.fresh < rung.width for rung in self.rungs):
            raise InputError("every rung needs a fidelity in (0, 1] and at least two vectors, uniform and another; raise its width")
        if any(low.fidelity >= high.fidelity or low.width < high.width for low, high in pairwise(self.rungs)):
            raise InputError("rungs must rise in fidelity and not in width; sort them")


@dataclass(frozen=True)
class Request:
    """Rank vectors to measure side by side, on the same batches and from the same initial values.

    Attributes:
        proposals: The vectors, each with where it comes from.
        fidelity: Share of a full recovery's steps; 1 for elastic scores.
        kind: A real recovery, or a forward pass of the elastic adapter.
        cost: What it is expected to take, in units of one full recovery; nothing for elastic scores, whose cost only trials tell.
    """

    proposals: tuple[Proposal, ...]
    fidelity: float
    kind: Literal["recovery", "elastic"]
    cost: float


def next_request(space: RankSpace, history: Sequence[RankTrial], learner: Learner, schedule: Schedule, seed: int = 0) -> Request | None:
    """Returns what to measure next, or None when the schedule is through or the cost is spent.

    Args:
        space: Of the search.
        history: Every trial so far, failed ones too, requests in their order; inside a request the order does not matter.
        learner: Proposes and predicts.
        schedule: How the cost is spent.
        seed: Of the proposals.
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
            wanted = _promoted(space, below, learner, schedule, place, seed)
            missing = tuple(proposal for proposal in wanted if proposal.ranks not in there)
        if missing:
            return _affordable(missing, rung, below if schedule.continued else [], left, alone=not level)
    return None


def winner(space: RankSpace, history: Sequence[RankTrial], learner: Learner) -> Ranks:
    """Returns the best of the vectors that were recovered for longest, by prediction from all trials; uniform where none beats it.

    Raises:
        InputError: Nothing was recovered.
    """
    done = [trial for trial in history if trial.kind == "recovery" and trial.loss_nats is not None]
    if not done:
        raise InputError("no rank vector could be recovered: every trial failed; see their notes, and try a lower learning rate")
    longest = max(trial.fidelity for trial in done)
    vectors = sorted({trial.ranks for trial in done if trial.fidelity == longest})
    gains = learner.predict(space, history, vectors).gain_nats
    best = int(np.argmax(gains))
    return vectors[best] if gains[best] > 0 else space.uniform_ranks


def finalists(
    space: RankSpace, history: Sequence[RankTrial], learner: Learner, found: Ranks, closed_forms: Collection[Ranks]
) -> tuple[Ranks, ...]:
    """Returns what is worth comparing with uniform on fresh seeds: what was found, and the best of the closed forms.

    A closed form was not chosen for its measurements, so that luck has no part in it; and what one search takes for a difference of the
    two is often noise. It is left out where it is expected to lose by more than the model's uncertainty.

    Args:
        space: Of the search.
        history: Every trial.
        learner: Predicts.
        found: The :func:`winner`.
        closed_forms: Vectors that closed forms had proposed, among those that were recovered.
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
    """Returns what is missing of the elastic scores: uniform and vectors at random, which tell of every slot, then proposals."""
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
    """Returns what is missing of the present round of proposals at one level; nothing when the level is full.

    A round is proposed from whole rounds only, with random numbers of its own: half a round on disk does not change the other half.
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


def _promoted(space: RankSpace, below: Sequence[RankTrial], learner: Learner, schedule: Schedule, place: int, seed: int) -> list[Proposal]:
    """Returns the vectors of a higher rung: uniform, the best survivors of the rung before, and fresh proposals."""
    rung, fidelity = schedule.rungs[place], schedule.rungs[place - 1].fidelity
    uniform = space.uniform_ranks
    passed = {trial.ranks for trial in below if trial.kind == "recovery" and trial.fidelity == fidelity and trial.loss_nats is not None}
    others = sorted(passed - {uniform})
    gains = learner.predict(space, below, others).gain_nats if others else np.zeros(0)
    order = sorted(range(len(others)), key=lambda place: -float(gains[place]))
    survivors = [Proposal(others[place], "survivor") for place in order[: rung.width - 1 - rung.fresh]]
    if not rung.fresh:
        return [Proposal(uniform, "uniform"), *survivors]
    return [
        Proposal(uniform, "uniform"),
        *survivors,
        *learner.propose(space, below, rung.fresh, np.random.default_rng((seed, place + 1, 0))),
    ]


def _affordable(missing: Sequence[Proposal], rung: Rung, below: Sequence[RankTrial], left: float, *, alone: bool) -> Request | None:
    """Returns as many of the missing vectors as can be paid for, in their order; None where that leaves uniform without a partner."""
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
