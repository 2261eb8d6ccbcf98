"""Trials as arrays."""

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
    """N successful trials, in an order that does not depend on the order of measuring.

    Attributes:
        choices: (N, L) place of every rank among the choices.
        losses: (N,) in nats.
        fidelity: (N,) share of a full recovery.
        elastic: (N,) whether it is a score of the elastic adapter.
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
        """Returns (N,) the losses less the mean of their group."""
        return self.losses - group_means(self.losses, self.group)


def observe(space: RankSpace, trials: Sequence[RankTrial]) -> Observations:
    """Returns the trials that have a loss, as arrays."""
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
    """Returns the key by which :func:`observe` sorts trials."""
    return trial.kind, trial.fidelity, trial.seed, trial.ranks


def stacked(space: RankSpace, vectors: Sequence[Ranks]) -> NDArray[np.int64]:
    """Returns (N, L) the places among the choices of the ranks of N vectors."""
    return np.array([choice_indices(space, ranks) for ranks in vectors], dtype=np.int64).reshape(len(vectors), len(space.slots))


def group_means(values: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns (N,) the mean over the group of every entry."""
    if not len(values):
        return np.zeros(0)
    return (np.bincount(group, values) / np.maximum(np.bincount(group), 1))[group]
