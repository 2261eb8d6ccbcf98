"""A search without a model: a planted loss, and a measure that writes down every call, sleeps, dies or diverges as it is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from regraft.allocation.contract import Prediction, Proposal, Ranks
from regraft.allocation.schedule import Rung, Schedule
from regraft.errors import TrainingError
from regraft.plans import CrossValidation, RankSlot, RankSpace, RankTrial
from regraft.search.contract import Job

SPACE = RankSpace(
    fingerprint="planted",
    granularity="layer",
    slots=tuple(RankSlot(f"layers.{index}", (f"layers.{index}.q",), index, 10 + index, 12) for index in range(4)),
    choices=(2, 4, 6, 8),
    budget=276,
    uniform=6,
)
SCHEDULE = Schedule(rungs=(Rung(0.25, 6), Rung(0.5, 3), Rung(1.0, 2)), batch=3)
WEIGHTS = (0.5, 0.1, 0.3, 0.2)


def planted_loss(ranks: Sequence[int], fidelity: float) -> float:
    """Returns a loss that is concave in the ranks and falls with training."""
    return 3.0 - fidelity - sum(weight * rank**0.5 for weight, rank in zip(WEIGHTS, ranks, strict=True)) / 10


class PlantedLearner:
    """Proposes uniform, then vectors drawn at random; believes the lowest loss that it has seen of a vector."""

    name = "planted"
    learns_from_scores = False

    def propose(
        self,
        space: RankSpace,
        history: Sequence[RankTrial],
        count: int,
        generator: np.random.Generator,
        pending: Sequence[Ranks] = (),
    ) -> tuple[Proposal, ...]:
        seen = {trial.ranks for trial in history} | set(pending)
        uniform = space.uniform_ranks
        found = [] if uniform in seen else [Proposal(uniform, "uniform")]
        while len(found) < count:
            ranks = tuple(int(rank) for rank in generator.choice(space.choices, len(space.slots)))
            if space.holds(ranks) and ranks not in seen and all(ranks != proposal.ranks for proposal in found):
                found.append(Proposal(ranks, "random"))
        return tuple(found)

    def predict(self, space: RankSpace, history: Sequence[RankTrial], ranks: Sequence[Ranks]) -> Prediction:
        best = {
            vector: min((t.loss_nats for t in history if t.ranks == vector and t.loss_nats is not None), default=9.0) for vector in ranks
        }
        uniform = min((t.loss_nats for t in history if t.ranks == space.uniform_ranks and t.loss_nats), default=9.0)
        return Prediction(np.array([uniform - best[vector] for vector in ranks]), np.ones(len(ranks)))

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> CrossValidation | None:
        return None


@dataclass(frozen=True)
class PlantedMeasure:
    """Measures by formula and appends a line to a log for each measurement that it begins.

    Attributes:
        log: The file; one line is ``pid ranks fidelity phase``.
        seconds: How long one measurement takes.
        dies_on: These vectors kill the process that measures them ...
        unless: ... unless this file exists; it is made just before.
        diverges_on: These vectors diverge.
        waits_for: No measurement ends before this file exists.
    """

    log: Path
    seconds: float = 0.0
    dies_on: tuple[Ranks, ...] = ()
    unless: Path | None = None
    diverges_on: tuple[Ranks, ...] = field(default=())
    waits_for: Path | None = None

    def open(self, threads: int | None = None) -> PlantedMeasure:
        return self

    def __call__(self, jobs: Sequence[Job]) -> list[RankTrial]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> RankTrial:
        with self.log.open("a") as stream:
            stream.write(f"{os.getpid()} {','.join(map(str, job.ranks))} {job.fidelity} {job.phase}/{job.seed}\n")
        time.sleep(self.seconds)
        limit = time.monotonic() + 200
        while self.waits_for is not None and not self.waits_for.exists():
            assert time.monotonic() < limit, f"{self.waits_for} is never made"
            time.sleep(0.02)
        if job.ranks in self.dies_on and not (self.unless is not None and self.unless.exists()):
            if self.unless is not None:
                self.unless.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if job.ranks in self.diverges_on:
            raise TrainingError("the training loss became nan at step 3")
        return RankTrial(job.ranks, planted_loss(job.ranks, job.fidelity), job.fidelity, 0.25, job.kind, job.seed)


def measured(log: Path) -> list[str]:
    """Returns what was measured, by vector, fidelity and phase, in the order in which it was begun."""
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
