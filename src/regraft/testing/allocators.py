"""Checks that every allocator must pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from regraft.allocation import features
from regraft.allocation.contract import Allocator, ClosedForm, Learner, Ranks
from regraft.plans import RankSlot, RankSpace, RankTrial
from regraft.testing.planted import World
from regraft.testing.require import generators_left_alone, require


def check_allocator(allocator: Allocator, space: RankSpace | None = None) -> None:
    """Checks an allocator on a planted space of eight slots.

    A closed form gives a vector of the space, the same one each time, that spends at least nine tenths of the budget.

    A learner proposes the uniform vector first, then only vectors of the space that were neither measured nor are pending, the same ones
    for the same state of the generator; it lives with failed trials, and predicts finite numbers for what it is asked.

    Args:
        allocator: A closed form or a learner.
        space: The space to allocate in; default: a planted one whose slots have every feature that regraft measures.

    Raises:
        NonconformingError: With what the allocator did.
    """
    who = f"allocator '{allocator.name}'"
    world = World()
    space = space or with_every_feature(world.space)
    match allocator:
        case ClosedForm():
            _check_closed_form(who, allocator, space)
        case learner:
            _check_learner(who, learner, space, world)


def with_every_feature(space: RankSpace) -> RankSpace:
    """Returns the space with random positive values of every feature that regraft measures; curves rise with the rank."""
    draw = np.random.default_rng(4)
    slots: list[RankSlot] = []
    for slot in space.slots:
        more = {name: float(draw.random() + 0.1) for name in (features.SHARE_PRUNED, features.IMPORTANCE_REMOVED)}
        for name in (features.GRADIENT_ENERGY, features.EVA, features.ADALORA):
            rising = np.sort(draw.random(len(space.choices)) + 0.1)
            more |= {f"{name}@{rank}": float(value) for rank, value in zip(space.choices, rising, strict=True)}
        slots.append(replace(slot, features=more | slot.features))
    return replace(space, slots=tuple(slots))


def _check_closed_form(who: str, allocator: ClosedForm, space: RankSpace) -> None:
    with generators_left_alone(who):
        ranks = allocator.allocate(space)
    require(len(ranks) == len(space.slots), f"{who} gives {len(ranks)} ranks for {len(space.slots)} slots")
    require(
        space.holds(ranks), f"{who} gives {tuple(ranks)}: a rank that is not allowed, or {space.cost(ranks)} of {space.budget} parameters"
    )
    require(space.cost(ranks) >= 0.9 * space.budget, f"{who} spends {space.cost(ranks)} of the {space.budget} parameters")
    require(tuple(allocator.allocate(space)) == tuple(ranks), f"{who} gives another vector for the same space")


def _check_learner(who: str, learner: Learner, space: RankSpace, world: World) -> None:
    history: list[RankTrial] = []
    for round_number in range(2):
        asked: Sequence[Ranks] = (space.uniform_ranks,) if round_number else ()
        with generators_left_alone(who):
            proposed = [proposal.ranks for proposal in learner.propose(space, history, 4, np.random.default_rng(round_number), asked)]
        again = [proposal.ranks for proposal in learner.propose(space, history, 4, np.random.default_rng(round_number), asked)]
        require(proposed == again, f"{who} proposes other vectors for the same state of the generator")
        require(0 < len(proposed) <= 4 and len(set(proposed)) == len(proposed), f"{who} proposes {proposed} where up to 4 were asked for")
        if not round_number:
            require(tuple(proposed[0]) == space.uniform_ranks, f"{who} proposes {proposed[0]} first, and not the uniform vector")
        known = {trial.ranks for trial in history} | set(asked)
        require(not known & set(proposed), f"{who} proposes what was measured, or is pending: {known & set(proposed)}")
        require(all(space.holds(ranks) for ranks in proposed), f"{who} proposes a vector that is not of the space")
        history += [world.trial(ranks) for ranks in proposed[:-1]] + [
            replace(world.trial(proposed[-1]), loss_nats=None, note="planted failure")
        ]
    asked = (space.uniform_ranks, *(trial.ranks for trial in history[:3]))
    found = learner.predict(space, history, asked)
    require(found.gain_nats.shape == found.deviation_nats.shape == (len(asked),), f"{who} predicts shapes other than ({len(asked)},)")
    finite = np.isfinite(found.gain_nats).all() and np.isfinite(found.deviation_nats).all() and (found.deviation_nats >= 0).all()
    require(bool(finite), f"{who} predicts numbers that are not finite, or a negative deviation")
    # A network that predicts losses of several nats in float32 rounds.
    require(abs(float(found.gain_nats[0])) < 1e-3, f"{who} predicts a gain of the uniform vector over itself: {found.gain_nats[0]:g}")
