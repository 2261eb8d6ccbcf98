"""Bayesian optimisation of the ranks by Optuna's Gaussian-process and tree-of-Parzen-estimators samplers, under the budget.

The samplers know no hard budget. A vector that they suggest is moved to the nearest vector of the space, and its loss is reported to
them under the moved vector. They see the gain over uniform at the longest recovery of each vector, but no fidelities or elastic scores.
"""

# Optuna is only partly typed: what it leaves unknown is not ours to mend.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler

from regraft.allocation.contract import ALLOCATORS, Learner, Prediction, Proposal, Ranks, refuse_prior
from regraft.allocation.fill import nearest, random_vectors
from regraft.allocation.paired import paired_gains
from regraft.allocation.prior import Prior
from regraft.allocation.uniform import uniform
from regraft.plans import RankSpace, RankTrial

_STARTUP = 8
_ATTEMPTS = 8  # suggestions tried before a random vector is taken, because the sampler often repeats measured vectors


@final
@dataclass(frozen=True)
class Bayes:
    """An Optuna sampler as a learner.

    Attributes:
        sampler: ``gp`` or ``tpe``.
        name: Name of the method on the command line.
        learns_from_scores: False: the samplers use no elastic scores.
    """

    sampler: Literal["gp", "tpe"]
    name: str
    learns_from_scores: bool = False

    def starting_from(self, prior: Prior) -> Learner:
        """Refuses every prior, because Optuna's samplers do not take one."""
        refuse_prior(self.name)

    def propose(
        self,
        space: RankSpace,
        history: Sequence[RankTrial],
        count: int,
        generator: np.random.Generator,
        pending: Sequence[Ranks] = (),
    ) -> tuple[Proposal, ...]:
        """Returns the uniform vector first, then seven random vectors, then suggestions of the sampler."""
        gains = paired_gains(space, history)
        taken = {trial.ranks for trial in history if trial.kind == "recovery"} | set(pending)
        proposals = [] if uniform(space) in taken else [Proposal(uniform(space), "uniform")]
        study = self._study(space, gains, int(generator.integers(2**31)))
        while len(proposals) < count:
            there = taken | {proposal.ranks for proposal in proposals}
            asked = None if len(there) < _STARTUP else _asked(study, space, there)
            found = [asked] if asked is not None else random_vectors(space, 1, there, generator)
            if not found:
                break
            proposals.append(Proposal(found[0], self.sampler if asked is not None else "random"))
        return tuple(proposals[:count])

    def predict(self, space: RankSpace, history: Sequence[RankTrial], ranks: Sequence[Ranks]) -> Prediction:
        """Returns the measured gains. A vector without a measurement gets the least of them, because the samplers predict none."""
        gains = paired_gains(space, history)
        least = min(gains.values(), default=0.0)
        return Prediction(np.array([gains.get(vector, least) for vector in ranks]), np.zeros(len(ranks)))

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> None:
        """Returns None, because the samplers expose no performance model."""

    def _study(self, space: RankSpace, gains: dict[Ranks, float], seed: int) -> optuna.Study:
        sampler: BaseSampler
        if self.sampler == "gp":
            sampler = GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=False)
        else:
            sampler = TPESampler(seed=seed, n_startup_trials=0)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study exists only during this call, so no message is needed
        try:
            study = optuna.create_study(direction="maximize", sampler=sampler)
        finally:
            optuna.logging.set_verbosity(verbosity)
        for ranks, gain in gains.items():
            study.add_trial(_trial(space, ranks, gain))
        return study


def _asked(study: optuna.Study, space: RankSpace, taken: set[Ranks]) -> Ranks | None:
    """Returns a vector that the sampler suggests and that is not taken, or None after a few attempts."""
    for _ in range(_ATTEMPTS):
        trial = study.ask(_distributions(space))
        ranks = nearest(space, [space.choices[trial.params[slot.name]] for slot in space.slots])
        if ranks not in taken:
            return ranks
    return None


def _distributions(space: RankSpace) -> dict[str, BaseDistribution]:
    """Returns one parameter for each slot: the index of its rank among the choices."""
    return {slot.name: IntDistribution(0, sum(rank <= slot.limit for rank in space.choices) - 1) for slot in space.slots}


def _trial(space: RankSpace, ranks: Ranks, gain: float) -> optuna.trial.FrozenTrial:
    places = {slot.name: space.choices.index(rank) for slot, rank in zip(space.slots, ranks, strict=True)}
    return optuna.trial.create_trial(params=places, distributions=_distributions(space), value=gain)


ALLOCATORS.include(Bayes("gp", "bayes"))
ALLOCATORS.include(Bayes("tpe", "bayes-tpe"))
