"""Trainer callbacks: seeds of dropout, loss log, best tensors, checkpoints and progress."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regraft.adapters.seeding import derived_seed
from regraft.progress import Say, Step, say_nothing
from regraft.surgery.adapters import Injected
from regraft.training.checkpoint import (
    Checkpoint,
    Tensors,
    checkpoints,
    optimizer_state,
    put_optimizer_state,
    put_tensors,
    trained_tensors,
    write_checkpoint,
)
from regraft.training.distributed import is_main, process_index

LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class LogRow:
    """One line of the loss log.

    Attributes:
        step: Number of optimizer steps made.
        lr: Learning rate of that step; None before the first step.
        train_loss_nats: Mean training loss of the steps since the previous row; None before the first step.
        held_out_loss_nats: Mean held-out loss of a token; None if it was not measured.
        seconds: Wall-clock time since the run began, without interruptions.
    """

    step: int
    lr: float | None
    train_loss_nats: float | None
    held_out_loss_nats: float | None
    seconds: float


def log_csv(rows: Iterable[LogRow]) -> str:
    """Returns a loss log as CSV, without the wall-clock times, so that equal runs give equal bytes."""
    names = [field.name for field in fields(LogRow) if field.name != "seconds"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()


@final
class Pace(TrainerCallback):
    """Callback that decides when to log and evaluate, and seeds dropout by the step, so that no generator state is stored.

    Args:
        eval_every: Number of optimizer steps between two evaluations; the last step is always evaluated.
        seed: Seed of the run.
    """

    def __init__(self, eval_every: int, seed: int) -> None:
        self._eval_every = eval_every
        self._seed = seed

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seeds the draws of the step; each process has its own seed."""
        other = (process_index(),) if process_index() else ()
        torch.manual_seed(derived_seed(self._seed, "step", state.global_step, *other))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a row of the log and the held-out loss, when they are due."""
        looks = state.global_step % self._eval_every == 0 or state.global_step >= state.max_steps
        control.should_evaluate = looks
        control.should_log = looks or state.global_step % LOG_EVERY_STEPS == 0


@final
class Keeper(TrainerCallback):
    """Callback that keeps the log, the best tensors and the checkpoints, and restores them when a run is resumed.

    Args:
        work: Folder of the checkpoints.
        injected: The model with its adapter.
        identity: Inputs that identify the run; each checkpoint stores them.
        resumed: The checkpoint to resume from, or None.
        patience: Number of consecutive evaluations without a lower held-out loss after which training stops; None for never.
    """

    def __init__(
        self, work: Path, injected: Injected, identity: Mapping[str, str], resumed: Checkpoint | None, patience: int | None = None
    ) -> None:
        self._work = work
        self._injected = injected
        self._identity = dict(identity)
        self._resumed = resumed
        self._patience = patience
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self._module: nn.Module | None = None
        self.rows: list[LogRow] = []
        self.best: Tensors = {}
        self.best_step = 0
        self.best_loss_nats = float("inf")

    @property
    def seconds(self) -> float:
        """Wall-clock time of training so far, summed over interrupted runs."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def first_loss_nats(self) -> float:
        """Held-out loss before the first step, in nats a token."""
        first = self.rows[0].held_out_loss_nats
        assert first is not None
        return first

    @property
    def out_of_patience(self) -> bool:
        """Returns whether the last ``patience`` evaluations found no lower loss."""
        return self._is_over(self.rows, self.best_step)

    @property
    def resumes_what_has_stopped(self) -> bool:
        """Returns whether the checkpoint to resume from belongs to a run that had already stopped by its patience."""
        if self._resumed is None:
            return False
        progress = self._resumed.progress
        return self._is_over([LogRow(**row) for row in progress["rows"]], progress["best_step"])

    def _is_over(self, rows: Iterable[LogRow], best_step: int) -> bool:
        looks = [row.step for row in rows if row.held_out_loss_nats is not None]
        return self._patience is not None and sum(step > best_step for step in looks) >= self._patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restores weights, optimizer, schedule and log."""
        if self._resumed is not None:
            put_optimizer_state(kwargs["optimizer"], self._resumed.optimizer)
            kwargs["lr_scheduler"].load_state_dict(self._resumed.progress["schedule"])
        self.begin(kwargs["model"])

    def begin(self, module: nn.Module) -> None:
        """Sets the trained module, and restores its weights and the log when a run is resumed."""
        self._module = module
        if self._resumed is None:
            return
        progress = self._resumed.progress
        put_tensors(module, self._resumed.trained)
        self._injected.adapter.put_state(self._injected.module, self._resumed.adapter)
        self.rows = [LogRow(**row) for row in progress["rows"]]
        self.best = self._resumed.best
        self.best_step, self.best_loss_nats = progress["best_step"], progress["best_loss_nats"]
        self._seconds_before = progress["seconds"]
        self._resumed = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds losses to the log; training and held-out loss of one step arrive separately and share a row."""
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:
            return
        if not self.rows or self.rows[-1].step != state.global_step:
            self.rows.append(LogRow(state.global_step, None, None, None, 0.0))
        row = replace(self.rows[-1], seconds=round(self.seconds, 3))
        if "loss" in logs:
            row = replace(row, lr=logs["learning_rate"], train_loss_nats=logs["loss"])
        if "eval_loss" in logs:
            row = replace(row, held_out_loss_nats=logs["eval_loss"])
        self.rows[-1] = row

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the tensors if they are the best, writes a checkpoint, and stops training when patience is exhausted."""
        assert metrics is not None
        model = kwargs["model"]
        tensors = trained_tensors(model)
        if metrics["eval_loss"] < self.best_loss_nats:
            self.best, self.best_step, self.best_loss_nats = tensors, state.global_step, metrics["eval_loss"]
        if state.global_step == 0:
            return
        progress = {
            "identity": self._identity,
            "schedule": kwargs["lr_scheduler"].state_dict(),
            "rows": [asdict(row) for row in self.rows],
            "best_step": self.best_step,
            "best_loss_nats": self.best_loss_nats,
            "seconds": self.seconds,
        }
        optimizer = optimizer_state(kwargs["optimizer"])
        if is_main():
            kept = self._injected.adapter.state(self._injected.module)
            write_checkpoint(self._work, Checkpoint(state.global_step, tensors, self.best, optimizer, progress, kept), state.save_to_json)
        if self.out_of_patience:
            control.should_training_stop = True

    def where_the_best_is(self) -> str:
        """Returns the end of an error message with the location of the best weights so far, or an empty string without any."""
        kept = checkpoints(self._work)
        return f"; the best weights so far (step {self.best_step}) are in '{kept[-1]}'" if kept else ""

    def put_best(self) -> None:
        """Copies the best tensors into the model."""
        assert self._module is not None
        put_tensors(self._module, self.best)


@final
class Told(TrainerCallback):
    """Callback that tells how far training is, with the latest losses, in one process.

    Args:
        say: Called with each line.
        doing: What the steps are for.
    """

    def __init__(self, say: Say, doing: str = "training") -> None:
        self._say = say if is_main() else say_nothing
        self._doing = doing
        self._losses: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tells where training begins."""
        self._tell(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tells the number of the step."""
        self._tell(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Notes the latest losses."""
        names = {"loss": "train", "eval_loss": "held-out"}
        self._losses |= {names[name]: value for name, value in (logs or {}).items() if name in names}
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        found = " and ".join(f"{name} {value:.3f}" for name, value in self._losses.items())
        self._say(Step(self._doing, state.global_step, state.max_steps, f"loss {found}" if found else ""))


@final
class AfterStep(TrainerCallback):
    """Callback that calls the adapter after each optimizer step, before the gradients are cleared.

    Args:
        injected: The model with its adapter.
    """

    def __init__(self, injected: Injected) -> None:
        self._injected = injected

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Calls the adapter with the number of the step, from 1."""
        self._injected.adapter.after_step(self._injected.module, state.global_step + 1)
