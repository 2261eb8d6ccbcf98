"""Bayesian optimisation of the ranks by Optuna: its Gaussian process and its tree of Parzen estimators, under our budget.

The samplers know no hard budget of this kind: what they ask for is moved to the nearest vector of the space, which is what they are told
of afterwards. They see the gain over uniform at the longest recovery of each vector; fidelities and elastic scores are nothing to them.
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
_ATTEMPTS = 8  # asks for one proposal before a vector at random is taken: the sampler likes what is measured already


@final
@dataclass(frozen=True)
class Bayes:
    """An Optuna sampler as a learner.

    Attributes:
        sampler: ``gp`` or ``tpe``.
        name: As on the command line.
        learns_from_scores: As the contract says.
    """

    sampler: Literal["gp", "tpe"]
    name: str
    learns_from_scores: bool = False

    def starting_from(self, prior: Prior) -> Learner:
        """Refuses: Optuna's samplers begin with nothing."""
        refuse_prior(self.name)

    def propose(
        self,
        space: RankSpace,
        history: Sequence[RankTrial],
        count: int,
        generator: np.random.Generator,
        pending: Sequence[Ranks] = (),
    ) -> tuple[Proposal, ...]:
        """Returns uniform first, seven vectors at random, then what the sampler asks for."""
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
        """Returns the measured gains; of what was not measured, the least of them: the samplers have no say on that."""
        gains = paired_gains(space, history)
        least = min(gains.values(), default=0.0)
        return Prediction(np.array([gains.get(vector, least) for vector in ranks]), np.zeros(len(ranks)))

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> None:
        """Has no performance model that could be asked."""

    def _study(self, space: RankSpace, gains: dict[Ranks, float], seed: int) -> optuna.Study:
        sampler: BaseSampler
        if self.sampler == "gp":
            sampler = GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=False)
        else:
            sampler = TPESampler(seed=seed, n_startup_trials=0)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study that lives for one call is no news
        try:
            study = optuna.create_study(direction="maximize", sampler=sampler)
        finally:
            optuna.logging.set_verbosity(verbosity)
        for ranks, gain in gains.items():
            study.add_trial(_trial(space, ranks, gain))
        return study


def _asked(study: optuna.Study, space: RankSpace, taken: set[Ranks]) -> Ranks | None:
    """Returns a vector that the sampler asks for and that is not taken; None after a few attempts."""
    for _ in range(_ATTEMPTS):
        trial = study.ask(_distributions(space))
        ranks = nearest(space, [space.choices[trial.params[slot.name]] for slot in space.slots])
        if ranks not in taken:
            return ranks
    return None


def _distributions(space: RankSpace) -> dict[str, BaseDistribution]:
    """Returns one parameter for each slot: the place of its rank among the choices."""
    return {slot.name: IntDistribution(0, sum(rank <= slot.limit for rank in space.choices) - 1) for slot in space.slots}


def _trial(space: RankSpace, ranks: Ranks, gain: float) -> optuna.trial.FrozenTrial:
    places = {slot.name: space.choices.index(rank) for slot, rank in zip(space.slots, ranks, strict=True)}
    return optuna.trial.create_trial(params=places, distributions=_distributions(space), value=gain)


ALLOCATORS.add("bayes", Bayes("gp", "bayes"))
ALLOCATORS.add("bayes-tpe", Bayes("tpe", "bayes-tpe"))
