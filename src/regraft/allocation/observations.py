"""Trials as arrays, for the performance model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.contract import Ranks
from regraft.allocation.fill import choice_indices
from regraft.plans import RankSpace, RankTrial


@dataclass(frozen=True, eq=False)
class Observations:
    """Arrays of N successful trials, in an order independent of the order of measuring.

    Attributes:
        choices: (N, L) index of every rank among the choices.
        losses: (N,) held-out losses in nats.
        fidelity: (N,) trained steps as a share of a full recovery's.
        elastic: (N,) whether the trial is a score of the elastic adapter.
        level: (N,) number of the trial's kind and fidelity.
        group: (N,) number of the trial's kind, fidelity and seed: trials of one group share batches and an offset.
    """

    choices: NDArray[np.int64]
    losses: NDArray[np.float64]
    fidelity: NDArray[np.float64]
    elastic: NDArray[np.bool_]
    level: NDArray[np.int64]
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.losses)

    def without_offsets(self) -> NDArray[np.float64]:
        """Returns the losses minus the mean of their group, (N,)."""
        return self.losses - group_means(self.losses, self.group)


def observe(space: RankSpace, trials: Sequence[RankTrial]) -> Observations:
    """Returns arrays of the trials that have a loss."""
    done = [trial for trial in trials if trial.loss_nats is not None and np.isfinite(trial.loss_nats)]
    done.sort(key=canonical)
    levels = {key: place for place, key in enumerate(dict.fromkeys((trial.kind, trial.fidelity) for trial in done))}
    groups = {key: place for place, key in enumerate(dict.fromkeys((trial.kind, trial.fidelity, trial.seed) for trial in done))}
    return Observations(
        stacked(space, [trial.ranks for trial in done]),
        np.array([trial.loss_nats for trial in done], dtype=np.float64),
        np.array([trial.fidelity for trial in done], dtype=np.float64),
        np.array([trial.kind == "elastic" for trial in done], dtype=np.bool_),
        np.array([levels[trial.kind, trial.fidelity] for trial in done], dtype=np.int64),
        np.array([groups[trial.kind, trial.fidelity, trial.seed] for trial in done], dtype=np.int64),
    )


def canonical(trial: RankTrial) -> tuple[str, float, int, Ranks]:
    """Returns the sort key of :func:`observe` for a trial."""
    return trial.kind, trial.fidelity, trial.seed, trial.ranks


def stacked(space: RankSpace, vectors: Sequence[Ranks]) -> NDArray[np.int64]:
    """Returns the indices among the choices of the ranks of N vectors, (N, L)."""
    return np.array([choice_indices(space, ranks) for ranks in vectors], dtype=np.int64).reshape(len(vectors), len(space.slots))


def group_means(values: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns for every entry the mean over its group, (N,)."""
    if not len(values):
        return np.zeros(0)
    return (np.bincount(group, values) / np.maximum(np.bincount(group), 1))[group]
