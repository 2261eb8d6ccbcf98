"""Contracts of a search: the jobs to measure, and the protocols of measuring.

A search never sees a model. It has a :class:`MeasureSpec`, a small value that can be sent to another process or machine, which opens it
to measure.
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
    """One measurement to make.

    Attributes:
        phase: ``search`` for choosing vectors; ``confirm`` for measurements on data and seeds that the search did not use.
        round: Number of the request that the job belongs to.
        index: Index of the job in that request.
        ranks: The rank vector.
        fidelity: Number of trained steps as a share of a full recovery's, in (0, 1].
        kind: Kind of the measurement: a real recovery, or a forward pass of the elastic adapter.
        seed: Seed of batches and initial values; jobs with the same seed are paired.
        origin: Reason for the vector, in a word or two.
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
        """Unique key of the job within its search."""
        return self.phase, self.round, self.index

    def failed(self, note: str) -> RankTrial:
        """Returns a failed trial for this job."""
        return RankTrial(self.ranks, None, self.fidelity, 0.0, self.kind, self.seed, note)


class Measure(Protocol):
    """A function that measures rank vectors."""

    def __call__(self, jobs: Sequence[Job]) -> Sequence[RankTrial]:
        """Returns one trial for each job, in order. A recovery that diverges gives a trial without loss, with a note.

        All jobs of one call have the same phase, fidelity, kind and seed.

        Raises:
            TrainingError: A candidate diverges or does not fit into memory. The search continues.
            RegraftError: An error that all candidates have in common, such as missing data. The search stops.
        """
        ...


class MeasureSpec(Protocol):
    """A value that can be pickled between the processes of one search, and that opens everything needed for measuring."""

    def open(self, threads: int | None = None) -> Measure:
        """Loads model and data; called once in every measuring process.

        Args:
            threads: Number of threads that the process may use on a shared machine; None leaves the choice to the libraries.
        """
        ...
