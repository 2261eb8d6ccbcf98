"""The contract of an allocator: a space of rank vectors, and what was measured so far, to the next vectors worth measuring.

Everything here is a pure function of values. Who measures (:mod:`regraft.training`), who keeps the trials on disk
(:mod:`regraft.search`) and when a vector is measured again for longer (:mod:`regraft.allocation.schedule`) is decided elsewhere; a
search that was killed goes on from its trials alone.
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
from regraft.registry import Registry

Ranks = tuple[int, ...]
"""One rank for each slot of a space."""


@dataclass(frozen=True)
class Proposal:
    """A rank vector that is worth measuring.

    Attributes:
        ranks: One for each slot.
        origin: Why, in a word or two: ``uniform``, ``gradient``, ``expected improvement``.
    """

    ranks: Ranks
    origin: str


@dataclass(frozen=True)
class Prediction:
    """What an allocator expects of rank vectors after a full recovery, against the uniform vector.

    Attributes:
        gain_nats: (N,) float64: held-out loss of uniform minus that of the vector; larger is better, 0 for uniform itself.
        deviation_nats: (N,) float64: standard deviation of each.
    """

    gain_nats: NDArray[np.float64]
    deviation_nats: NDArray[np.float64]


@final
@dataclass(frozen=True)
class ClosedForm:
    """An allocator that decides from the space alone and measures nothing.

    Attributes:
        name: As on the command line.
        allocate: The space to its one vector; raises PlanError where the slots lack the features that it needs.
    """

    name: str
    allocate: Callable[[RankSpace], Ranks]


class Learner(Protocol):
    """An allocator that learns from trials.

    It keeps nothing between calls: the same arguments and the same state of the generator give the same answer. Trials of all
    levels (kind, fidelity, seed) may be in the history, and failed ones, whose vectors are not proposed again.
    """

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def learns_from_scores(self) -> bool:
        """Whether elastic scores tell it anything; recoveries always do."""
        ...

    def starting_from(self, prior: Prior) -> Learner:
        """Returns the same with what past searches taught.

        Raises:
            InputError: It starts from nothing of the kind (:func:`refuse_prior`).
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
        """Returns up to ``count`` vectors to measure next, each of the space (``space.holds``) and none measured or pending.

        The uniform vector comes first of all. Fewer than asked for: there is nothing more to try.
        """
        ...

    def predict(self, space: RankSpace, history: Sequence[RankTrial], ranks: Sequence[Ranks]) -> Prediction:
        """Returns what is expected of rank vectors after a full recovery, from the trials so far."""
        ...

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> CrossValidation | None:
        """Returns the cross-validated error of the performance model; None without one, or with too few trials to tell."""
        ...


def refuse_prior(name: str) -> NoReturn:
    """Refuses a prior on behalf of an allocator that has no use for one."""
    raise InputError(f"--prior tells the method {name} nothing; leave it out, or use --method rankadaptor")


Allocator = ClosedForm | Learner

ALLOCATORS: Registry[Allocator] = Registry("allocator", group="regraft.allocators")
