"""RankAdaptor (arXiv 2406.15734): ranks by a performance model that is re-fitted after every round of measurements.

This is our variant, the default method. It has the paper's three phases. *Initialisation* measures uniform, the vectors of the closed
forms, the vector that the prior holds for the best, and draws from the prior (which meta-training on past searches makes sharp).
*Incremental learning* re-fits the model of :mod:`regraft.allocation.concave` and proposes the vectors of largest expected improvement.
*Convergence* is the work of the schedule, which recovers the most promising vectors for longer and longer.

Departures from the paper: the budget is a hard limit on trainable parameters, not a sum of ranks; the measurement is the held-out loss
compared with uniform on the same batches, not the score of a task; proposals are improved by local moves instead of taken from a random
sample; and the result is confirmed on fresh seeds (:mod:`regraft.allocation.confirm`).
"""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from regraft.allocation.adalora import adalora
from regraft.allocation.contract import ALLOCATORS, PRIOR, Prediction, Proposal, Ranks
from regraft.allocation.eva import eva
from regraft.allocation.features import ADALORA, EVA, GRADIENT_ENERGY, IMPORTANCE_REMOVED, SHARE_PRUNED, has_curve, has_plain
from regraft.allocation.fill import fill, moved, moves
from regraft.allocation.fitting import fit
from regraft.allocation.gradient import gradient
from regraft.allocation.prior import Prior, shipped_prior
from regraft.allocation.proportional import proportional
from regraft.allocation.uniform import uniform
from regraft.allocation.validation import cross_validate
from regraft.plans import CrossValidation, RankSpace, RankTrial

_DRAWS = 32  # posterior draws, each giving its best vector
_BEST = 4  # vectors of the pool that get local moves in a round
_MOVES = 24  # sampled moves of each of these vectors
_ROUNDS = 3  # rounds of local moves


@final
@dataclass(frozen=True, eq=False)
class RankAdaptor:
    """The learner with the concave performance model.

    Attributes:
        prior: Prior of the performance model; None for the one that comes with the package.
        name: Name of the method on the command line.
        learns_from_scores: True: elastic scores are fitted together with recoveries.
    """

    prior: Prior | None = None
    name: str = field(default="rankadaptor")
    learns_from_scores: bool = True

    def starting_from(self, prior: Prior) -> RankAdaptor:
        """Returns the learner with another prior."""
        return replace(self, prior=prior)

    def propose(
        self,
        space: RankSpace,
        history: Sequence[RankTrial],
        count: int,
        generator: np.random.Generator,
        pending: Sequence[Ranks] = (),
    ) -> tuple[Proposal, ...]:
        """Returns the vectors of the closed forms first, then the prior's own, then those of largest expected improvement."""
        taken = {trial.ranks for trial in history if trial.kind == "recovery"} | set(pending)
        first = first_vectors(space)
        if self.beliefs.features:  # without features all slots are alike before the first trial, and the best vector is uniform
            own = Proposal(fill(space, fit(space, (), self.beliefs).table()), PRIOR)
            first += [own] if space.holds(own.ranks) and own.ranks not in {proposal.ranks for proposal in first} else []
        chosen = [proposal for proposal in first if proposal.ranks not in taken][:count]
        if len(chosen) == count:
            return tuple(chosen)
        taken |= {proposal.ranks for proposal in chosen}
        search = _Improvement(self, space, history, generator)
        found = search.best(count - len(chosen), taken)
        return (*chosen, *(Proposal(ranks, "expected improvement") for ranks in found))

    def predict(self, space: RankSpace, history: Sequence[RankTrial], ranks: Sequence[Ranks]) -> Prediction:
        """Returns means and standard deviations of the posterior gains."""
        mean, covariance = fit(space, history, self.beliefs).moments(ranks)
        return Prediction(mean, np.sqrt(np.maximum(np.diag(covariance), 0.0)))

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> CrossValidation | None:
        """Returns the cross-validated error of the model, on rank vectors that it was not fitted to."""

        def predict(seen: Sequence[RankTrial], unseen: Sequence[RankTrial]) -> NDArray[np.float64]:
            posterior = fit(space, seen, self.beliefs)
            gains = posterior.moments([trial.ranks for trial in unseen])[0]
            return -gains * posterior.scale(np.array([trial.fidelity for trial in unseen]))

        return cross_validate(space, history, predict)

    @property
    def beliefs(self) -> Prior:
        """The prior in use."""
        return self.prior if self.prior is not None else shipped_prior()


def first_vectors(space: RankSpace) -> list[Proposal]:
    """Returns the vectors of all closed forms whose features the slots have, uniform first, each vector once."""
    closed = [("uniform", uniform(space))]
    if has_plain(space, SHARE_PRUNED) or has_plain(space, IMPORTANCE_REMOVED):
        closed.append(("proportional", proportional(space)))
    for name, curve, allocate in (("gradient", GRADIENT_ENERGY, gradient), ("eva", EVA, eva), ("adalora", ADALORA, adalora)):
        if has_curve(space, curve):
            closed.append((name, allocate(space)))
    named: dict[Ranks, str] = {}
    for name, ranks in closed:
        named.setdefault(ranks, name)
    return [Proposal(ranks, name) for ranks, name in named.items()]


class _Improvement:
    """A search for vectors of large expected improvement over the best measured vector."""

    def __init__(self, learner: RankAdaptor, space: RankSpace, history: Sequence[RankTrial], generator: np.random.Generator) -> None:
        self.space, self.generator = space, generator
        self.posterior = fit(space, history, learner.beliefs)
        measured = sorted({trial.ranks for trial in history if trial.loss_nats is not None} | {uniform(space)})
        self.measured = measured
        self.best_gain = float(self.posterior.moments(measured)[0].max())

    def best(self, count: int, taken: set[Ranks]) -> list[Ranks]:
        """Returns up to ``count`` vectors, each chosen as if the previous ones had been measured with their expected gains."""
        pool = self._pool(taken)
        if not pool:
            return []
        mean, covariance = self.posterior.moments(pool)
        noise = self.posterior.noise_nats**2
        chosen: list[Ranks] = []
        free = np.ones(len(pool), dtype=np.bool_)
        target = self.best_gain
        for _ in range(min(count, len(pool))):
            value = np.where(free, expected_improvement(mean, np.diag(covariance), target), -np.inf)
            place = int(np.argmax(value))
            chosen.append(pool[place])
            free[place] = False
            target = max(target, float(mean[place]))
            column = covariance[:, place]
            covariance = covariance - np.outer(column, column) / (covariance[place, place] + noise)
        return chosen

    def _pool(self, taken: set[Ranks]) -> list[Ranks]:
        """Returns candidates: best vectors for the posterior mode and for posterior draws, measured ones, and local moves of the best."""
        drawn = [fill(self.space, table, rough=True) for table in self.posterior.draw_tables(self.generator, _DRAWS)]
        pool = dict.fromkeys(
            ranks for ranks in (fill(self.space, self.posterior.table()), *drawn, *self.measured) if self.space.holds(ranks)
        )
        for _ in range(_ROUNDS):
            vectors = list(pool)
            mean, covariance = self.posterior.moments(vectors)
            order = np.argsort(-expected_improvement(mean, np.diag(covariance), self.best_gain), kind="stable")
            for place in order.tolist()[:_BEST]:
                pool |= dict.fromkeys(self._around(vectors[place]))
        return [ranks for ranks in pool if ranks not in taken]

    def _around(self, ranks: Ranks) -> Iterable[Ranks]:
        up, down = moves(self.space, ranks)
        for place in self.generator.permutation(len(up))[:_MOVES]:
            yield moved(self.space, ranks, int(up[place]), int(down[place]))


def expected_improvement(mean: NDArray[np.float64], variance: NDArray[np.float64], best: float) -> NDArray[np.float64]:
    """Returns the expected improvement of Gaussian gains over ``best``, (N,) (Jones et al. 1998, equation 15)."""
    deviation = np.sqrt(np.maximum(variance, 0.0)) + 1e-12
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    return deviation * (z * ndtr(z) + density)


ALLOCATORS.include(RankAdaptor())
