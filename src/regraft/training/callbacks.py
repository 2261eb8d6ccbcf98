"""What happens beside the optimizer steps: dropout's seed, the log, the best tensors, checkpoints, a progress bar."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regraft.adapters.seeding import derived_seed
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
        step: Optimizer steps taken.
        lr: Learning rate of that step; None before the first.
        train_loss_nats: Mean training loss of the steps since the row before; None before the first.
        held_out_loss_nats: Mean held-out loss of a token; None where it was not measured.
        seconds: Wall-clock time since the run began, interruptions left out.
    """

    step: int
    lr: float | None
    train_loss_nats: float | None
    held_out_loss_nats: float | None
    seconds: float


def log_csv(rows: Iterable[LogRow]) -> str:
    """Writes a loss log as CSV, without the wall-clock times, so that the same run is the same bytes."""
    names = [field.name for field in fields(LogRow) if field.name != "seconds"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return stream.getvalue()


@final
class Pace(TrainerCallback):
    """Says when to log and evaluate, and seeds dropout by the step, so that no generator's state has to be kept.

    Args:
        eval_every: Optimizer steps between two looks at the held-out loss; the last step is always looked at.
        seed: Of the run.
    """

    def __init__(self, eval_every: int, seed: int) -> None:
        self._eval_every = eval_every
        self._seed = seed

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seeds what the step draws; processes draw differently, since their rows differ."""
        other = (process_index(),) if process_index() else ()
        torch.manual_seed(derived_seed(self._seed, "step", state.global_step, *other))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a row of the log and for the held-out loss."""
        looks = state.global_step % self._eval_every == 0 or state.global_step >= state.max_steps
        control.should_evaluate = looks
        control.should_log = looks or state.global_step % LOG_EVERY_STEPS == 0


@final
class Keeper(TrainerCallback):
    """Keeps the log, the best tensors and the checkpoints, and puts everything back when a run is resumed.

    Args:
        work: Folder of the checkpoints.
        injected: The model with its adapter.
        identity: What the run is of; a checkpoint carries it.
        resumed: The checkpoint to go on from, or None.
        patience: Looks in a row without a lower held-out loss after which training stops; None for no end.
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
        """Wall-clock time of training so far, over all its sittings."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def first_loss_nats(self) -> float:
        """Held-out loss before the first step."""
        first = self.rows[0].held_out_loss_nats
        assert first is not None
        return first

    @property
    def out_of_patience(self) -> bool:
        """Whether the last looks, as many as there is patience for, found nothing better."""
        return self._is_over(self.rows, self.best_step)

    @property
    def resumes_what_has_stopped(self) -> bool:
        """Whether the checkpoint to go on from is of a run whose patience was out: nothing is left to train."""
        if self._resumed is None:
            return False
        progress = self._resumed.progress
        return self._is_over([LogRow(**row) for row in progress["rows"]], progress["best_step"])

    def _is_over(self, rows: Iterable[LogRow], best_step: int) -> bool:
        looks = [row.step for row in rows if row.held_out_loss_nats is not None]
        return self._patience is not None and sum(step > best_step for step in looks) >= self._patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts weights, optimizer, schedule and log back."""
        if self._resumed is not None:
            put_optimizer_state(kwargs["optimizer"], self._resumed.optimizer)
            kwargs["lr_scheduler"].load_state_dict(self._resumed.progress["schedule"])
        self.begin(kwargs["model"])

    def begin(self, module: nn.Module) -> None:
        """Takes the module that is trained, and puts its weights and the log back where a run is resumed."""
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
        """Adds to the log. Training and held-out loss of one step come one after the other and share a row."""
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
        """Keeps the tensors if they are the best, writes a checkpoint, and stops when patience is out."""
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
        """Returns the end of a message that says where the best weights so far were kept, if they were."""
        kept = checkpoints(self._work)
        return f"; the best weights so far (step {self.best_step}) are in '{kept[-1]}'" if kept else ""

    def put_best(self) -> None:
        """Puts the best tensors into the model."""
        assert self._module is not None
        put_tensors(self._module, self.best)


@final
class Bar(TrainerCallback):
    """A progress bar with the losses and the time that is left, on the standard error; silent where that is no terminal.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        self._losses: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal or not is_main(),
            transient=True,
        )
        self._task = self._progress.add_task("training", total=None, losses="")

    def asking(self, done: int, rows: int) -> None:
        """Shows how many rows a teacher has been asked about."""
        self._progress.start()
        self._progress.update(self._task, completed=done, total=rows, losses="asking the teacher")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the bar."""
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step, losses="")
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves it."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the latest losses."""
        names = {"loss": "train", "eval_loss": "held-out"}
        self._losses |= {names[name]: value for name, value in (logs or {}).items() if name in names}
        text = " · ".join(f"{name} {value:.3f}" for name, value in self._losses.items())
        self._progress.update(self._task, losses=text)

    def close(self) -> None:
        """Takes it away."""
        self._progress.stop()


@final
class AfterStep(TrainerCallback):
    """Calls the adapter after each optimizer step, while the gradients are still there.

    Args:
        injected: The model with its adapter.
    """

    def __init__(self, injected: Injected) -> None:
        self._injected = injected

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Passes the number of the step on, from 1."""
        self._injected.adapter.after_step(self._injected.module, state.global_step + 1)
