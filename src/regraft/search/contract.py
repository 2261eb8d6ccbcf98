"""What is measured, and by whom: values and protocols that a search is made of.

A search never sees a model. It is given a :class:`MeasureSpec`, a small value that can be sent to another process or machine, and
opens it where the measuring is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from regraft.plans import RankTrial

Phase = Literal["search", "confirm"]
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Job:
    """One measurement to be made.

    Attributes:
        phase: Measurements of the search choose; those that confirm are made on data and seeds that the search has not seen.
        round: Number of the request that it is part of.
        index: Place in that request.
        ranks: The rank vector.
        fidelity: Share of a full recovery's steps, in (0, 1].
        kind: A real recovery, or a forward pass of the elastic adapter.
        seed: Of batches and initial values; jobs of one seed are paired.
        origin: Why this vector, in a word or two.
    """

    phase: Phase
    round: int
    index: int
    ranks: tuple[int, ...]
    fidelity: float
    kind: Literal["recovery", "elastic"] = "recovery"
    seed: int = 0
    origin: str = ""

    @property
    def key(self) -> Key:
        """What tells it from every other job of its search."""
        return self.phase, self.round, self.index

    def failed(self, note: str) -> RankTrial:
        """Returns the trial of a measurement that could not be made."""
        return RankTrial(self.ranks, None, self.fidelity, 0.0, self.kind, self.seed, note)


class Measure(Protocol):
    """Measures rank vectors."""

    def __call__(self, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        """Returns one trial for each job, in order; a recovery that diverges is a trial without loss, with a note.

        The jobs of one call have phase, fidelity, kind and seed in common.

        Raises:
            TrainingError: One of the candidates cannot be trained: it diverges, or does not fit into memory. The search goes on.
            RegraftError: Something is wrong with all of them alike. The search stops.
        """
        ...


class MeasureSpec(Protocol):
    """Everything that measuring needs, as a value that can be pickled between processes of one search."""

    def open(self, threads: int | None = None) -> Measure:
        """Loads model and data; called once in every process that measures.

        Args:
            threads: How many the process may use, because it shares the machine with others; None: as many as the libraries choose.
        """
        ...
