"""Unfinished trainings of a rank search, kept so that more steps go on from them: in memory, or one safetensors file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regraft.atomic import atomic_file


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Attributes:
        steps: Optimizer steps taken.
        best_nats: Lowest held-out loss where a recovery looks: every ``eval_every`` steps and at the end.
        tensors: What is trained and Adam's moments of it, by name, on the CPU.
    """

    steps: int
    best_nats: float
    tensors: Mapping[str, Tensor]


@final
class Kept:
    """Trainings by key.

    Args:
        folder: Of the files, so that other processes find them; None for memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Progress] = {}

    def get(self, key: str) -> Progress | None:
        """Returns what is kept; None also where a file is damaged, which only costs its steps again."""
        if self._folder is None:
            return self._memory.get(key)
        try:
            with safe_open(self._path(key), framework="pt") as file:
                values = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            return Progress(int(values["steps"]), float(values["best_nats"]), tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def put(self, key: str, progress: Progress) -> None:
        """Keeps a training in place of its earlier state; one that has come further stays.

        Raises:
            OutputError: It cannot be written.
        """
        before = self.get(key)
        if before is not None and before.steps >= progress.steps:
            return
        if self._folder is None:
            self._memory[key] = progress
            return
        metadata = {"steps": str(progress.steps), "best_nats": repr(progress.best_nats)}
        with atomic_file(self._path(key)) as partial:
            save_file(dict(progress.tensors), partial, metadata)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.safetensors"
