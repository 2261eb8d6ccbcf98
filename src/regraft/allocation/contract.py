"""The contract of an allocator: from a space of rank vectors and the trials so far to the next vectors to measure.

Everything here is a pure function of values. Other packages measure (:mod:`regraft.paired`) and store the trials
(:mod:`regraft.search`), and :mod:`regraft.allocation.schedule` decides when a vector is measured again for longer. A killed search
can therefore resume from its trials alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, final

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.prior import Prior
from regraft.errors import InputError
from regraft.plans import CrossValidation, RankSpace, RankTrial
from regraft.registry import NamedRegistry

Ranks = tuple[int, ...]
"""A rank vector: one rank for each slot of a space."""

PRIOR = "prior"
"""Origin of the vector that a learner's prior holds for the best before any trial."""


@dataclass(frozen=True)
class Proposal:
    """A rank vector to measure.

    Attributes:
        ranks: One rank for each slot.
        origin: Reason for the proposal: ``uniform``, ``gradient``, ``expected improvement`` or similar.
    """

    ranks: Ranks
    origin: str


@dataclass(frozen=True)
class Prediction:
    """Predicted gains of N rank vectors over the uniform vector, after a full recovery.

    Attributes:
        gain_nats: (N,) float64: held-out loss of uniform minus that of the vector; larger is better, and uniform itself has 0.
        deviation_nats: (N,) float64: standard deviation of each gain.
    """

    gain_nats: NDArray[np.float64]
    deviation_nats: NDArray[np.float64]


@final
@dataclass(frozen=True)
class ClosedForm:
    """An allocator that decides from the space alone, without measurements.

    Attributes:
        name: Name of the method on the command line.
        allocate: Function from a space to its rank vector; it raises PlanError when the slots lack features that it needs.
    """

    name: str
    allocate: Callable[[RankSpace], Ranks]

    @property
    def learns_from_scores(self) -> bool:
        """Returns False: nothing is measured."""
        return False

    def starting_from(self, prior: Prior) -> NoReturn:
        """Refuses a prior.

        Raises:
            InputError: Always.
        """
        refuse_prior(self.name)


class Learner(Protocol):
    """An allocator that learns from trials.

    It has no state between calls: the same arguments and the same state of the generator give the same result. The history may hold
    trials of all levels (kind, fidelity, seed), and failed trials, whose vectors are not proposed again.
    """

    @property
    def name(self) -> str:
        """Name of the method on the command line."""
        ...

    @property
    def learns_from_scores(self) -> bool:
        """Returns whether the method uses elastic scores in addition to recoveries."""
        ...

    def starting_from(self, prior: Prior) -> Learner:
        """Returns the same learner with a prior from past searches.

        Raises:
            InputError: The learner takes no prior (:func:`refuse_prior`).
        """
        ...

    def propose(
        self,
        space: RankSpace,
        history: Sequence[RankTrial],
        count: int,
        generator: np.random.Generator,
        pending: Sequence[Ranks] = (),
    ) -> tuple[Proposal, ...]:
        """Returns up to ``count`` vectors to measure next. Each belongs to the space (``space.holds``); none is measured or pending.

        The uniform vector is proposed first. Fewer than ``count`` vectors mean that nothing more is worth measuring.
        """
        ...

    def predict(self, space: RankSpace, history: Sequence[RankTrial], ranks: Sequence[Ranks]) -> Prediction:
        """Predicts the gains of rank vectors after a full recovery, from the trials so far."""
        ...

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> CrossValidation | None:
        """Returns the cross-validated error of the performance model; None without such a model, or with too few trials."""
        ...


def refuse_prior(name: str) -> NoReturn:
    """Refuses a prior, for allocators that take none."""
    raise InputError(f"`prior` has no effect on method '{name}'; leave it out, or use `method=rankadaptor`")


Allocator = ClosedForm | Learner

ALLOCATORS: NamedRegistry[Allocator] = NamedRegistry("allocator", group="regraft.allocators")
