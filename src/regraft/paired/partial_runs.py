"""Unfinished trainings of a rank search, stored in memory or in one safetensors file each, so that they can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regraft.atomic import atomic_file

_EARLIER = "-earlier"


@dataclass(frozen=True)
class PartialRun:
    """State of an unfinished training.

    Attributes:
        steps: Number of optimizer steps made.
        best_nats: Lowest held-out loss so far, over the evaluations of a recovery: every ``eval_every`` steps and at the end.
        tensors: Trained tensors and their Adam moments, by name, on the CPU.
        loss_nats: Loss of the measurement that ended with these steps; a search that was killed before it recorded it gets it from here.
        cost: Cost of that measurement, from the steps that an earlier one had made, in full recoveries.
        ranks: Rank vector that the measurement was made for.
    """

    steps: int
    best_nats: float
    tensors: Mapping[str, Tensor]
    loss_nats: float
    cost: float
    ranks: tuple[int, ...]


@final
class PartialRuns:
    """A store of unfinished trainings by key.

    Args:
        folder: Folder of the files, which other processes can read; None for memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, PartialRun] = {}

    def get(self, key: str) -> PartialRun | None:
        """Returns the stored state or None; a damaged file also gives None, so that its steps are repeated."""
        if self._folder is None:
            return self._memory.get(key)
        try:
            with safe_open(self._path(key), framework="pt") as file:
                values = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            ranks = tuple(int(rank) for rank in values["ranks"].split())
            return PartialRun(
                int(values["steps"]), float(values["best_nats"]), tensors, float(values["loss_nats"]), float(values["cost"]), ranks
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def earlier(self, key: str) -> PartialRun | None:
        """Returns the state that the stored one continues, or None: it began with the first step."""
        return self.get(f"{key}{_EARLIER}")

    def put(self, key: str, progress: PartialRun) -> None:
        """Stores a training's state, unless a state with as many or more steps is stored; the state before stays as the earlier one.

        Raises:
            OutputError: The file cannot be written.
        """
        before = self.get(key)
        if before is not None and before.steps >= progress.steps:
            return
        if before is not None:
            self._store(f"{key}{_EARLIER}", before)
        self._store(key, progress)

    def _store(self, key: str, progress: PartialRun) -> None:
        if self._folder is None:
            self._memory[key] = progress
            return
        numbers = {"best_nats": progress.best_nats, "loss_nats": progress.loss_nats, "cost": progress.cost}
        metadata = {"steps": str(progress.steps), "ranks": " ".join(map(str, progress.ranks))}
        metadata |= {name: repr(float(value)) for name, value in numbers.items()}
        with atomic_file(self._path(key)) as partial:
            save_file(dict(progress.tensors), partial, metadata)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.safetensors"
