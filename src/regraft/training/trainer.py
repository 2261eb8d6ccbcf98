"""The Hugging Face Trainer with an exact held-out loss, a stop on NaN, distillation, and our own checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from regraft.compat import recomputing, train_on_one_gpu
from regraft.errors import TrainingError
from regraft.surgery.adapters import Injected
from regraft.training.batches import Example, collate
from regraft.training.distributed import any_process, in_surroundings, is_sharded, process_count, process_index, sum_over_processes
from regraft.training.job import Batch, Job, SummedLoss
from regraft.training.optimizer import ParameterGroup, optimizer_arguments, scheduler_name
from regraft.training.teacher_cache import TeacherCache


def training_arguments(job: Job) -> TrainingArguments:
    """Writes a job in the Trainer's words. Checkpoints and the choice of the best one are ours, so both are off here."""
    settings, device = job.settings, job.model.device
    arguments = in_surroundings(
        TrainingArguments,
        output_dir=str(job.work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or 1e-3,  # has no effect, because the optimizer's groups have their own rates
        lr_scheduler_type=scheduler_name(settings.schedule),
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=job.compute == torch.bfloat16,
        use_cpu=device.type == "cpu",
        # All parameters of an adapter are used in every step, so that no process has to search for unused ones.
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device.type == "cpu" and process_count() > 1 else None,
        seed=job.seed % 2**32,  # the Trainer also seeds NumPy, whose seeds have 32 bits
        # The examples are already in order, so that resuming only skips some.
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_on_start=job.resumed is None,
        save_strategy="no",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
        **(recomputing() if settings.gradient_checkpointing else {}),
    )
    # The chosen dtype takes precedence over the environment (accelerate's launcher can request float16).
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    train_on_one_gpu(arguments)
    return arguments


@dataclass(frozen=True)
class StepLoss:
    """Training loss of one forward pass, as a part of the mean over all predicted tokens of the step in all processes.

    Attributes:
        objective: The loss summed over the predictions of a batch; None for the model's own mean.
        penalty: Returns what the adapter adds to the loss of a step, or None.
        passes: Forward passes of one step.
    """

    objective: SummedLoss | None
    penalty: Callable[[], Tensor | None]
    passes: int

    def of(self, model: nn.Module, batch: Batch, predicted: Tensor | int | None, own: Callable[[], Tensor]) -> Tensor:
        """Returns the loss of a batch.

        Args:
            model: The model, as it is wrapped for training.
            batch: The rows of one forward pass.
            predicted: Number of predictions of the step in all processes.
            own: Computes the model's own loss of the batch.
        """
        if self.objective is None:
            loss = own()
        else:
            assert predicted is not None
            # The gradients of all processes are averaged, but the gradient of the sum of their losses is needed.
            loss = self.objective(model, batch) / predicted * process_count()
        penalty = self.penalty()  # its gradients are averaged over processes too, and summed over the passes of a step
        return loss if penalty is None else loss + penalty / self.passes


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, whose mean loss over all predicted tokens chooses the best checkpoint.

    Attributes:
        batches: The rows; each process measures its share of them.
        summed: Function from a model and batches to the summed loss and the number of predictions.
        device: The device of training.
    """

    batches: Sequence[Batch]
    summed: Callable[[nn.Module, Iterable[Batch], torch.device], tuple[float, int]]
    device: torch.device

    def loss(self, model: nn.Module, step: int) -> float:
        """Returns the mean loss at a step, in nats a token.

        Raises:
            TrainingError: The loss is not finite.
        """
        mine = self.batches[process_index() :: process_count()]
        if is_sharded(model) and len(mine) < -(-len(self.batches) // process_count()):
            self.summed(model, self.batches[:1], self.device)  # all processes must gather the shards equally often
        total, count = sum_over_processes(self.summed(model, mine, self.device), self.device)
        loss = total / count
        if math.isfinite(loss):
            return loss
        if step == 0:
            raise TrainingError(
                f"the held-out loss is {loss} before the first step; the model's weights or its number type are at fault: "
                "check it with 'regraft evaluate', or use `dtype=float32`"
            )
        raise TrainingError(_not_finite(f"the held-out loss became {loss} at step {step}"))


@final
class RecoveryTrainer(Trainer):
    """The trainer of an adapter: what the Trainer would do otherwise is handed to a :class:`StepLoss` and a :class:`HeldOut`.

    Args:
        job: What is trained on, and how.
        injected: The job's model with its adapter.
        groups: All trained parameters with their learning rates.
        callbacks: Ours, after the Trainer's own.
        objective: The loss where there is a teacher; None for the one of the job's reading.
        cache: Where the teacher's likeliest tokens are, unless it runs along.
    """

    def __init__(
        self,
        job: Job,
        injected: Injected,
        groups: Sequence[ParameterGroup],
        callbacks: Sequence[TrainerCallback],
        objective: SummedLoss | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        collate_rows, padding, size = job.reading.collate, job.padding, job.settings.batch
        in_surroundings(
            super().__init__,
            model=injected.module,
            args=training_arguments(job),
            train_dataset=job.rows,
            data_collator=(partial(_collate_taught, padding=padding, cache=cache) if cache else lambda rows: collate_rows(rows, padding)),
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=(torch.optim.AdamW, optimizer_arguments(groups)),
        )
        self.remove_callback(PrinterCallback)
        penalty = partial(injected.adapter.penalty, injected.module)
        self._step_loss = StepLoss(objective or job.reading.objective, penalty, self.args.gradient_accumulation_steps)
        if self._step_loss.objective is not None:
            self.model_accepts_loss_kwargs = True  # our loss is given the number of predictions of all passes of a step
        held_out = [collate_rows(job.held_out[start : start + size], padding) for start in range(0, len(job.held_out), size)]
        self._held_out = HeldOut(held_out, job.reading.summed, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of one forward pass.

        Raises:
            TrainingError: The loss is not finite in one of the processes.
        """
        assert not return_outputs
        usual = super().compute_loss
        loss = self._step_loss.of(
            model, inputs, num_items_in_batch, lambda: cast(Tensor, usual(model, inputs, num_items_in_batch=num_items_in_batch))
        )
        value = float(loss.detach())
        finite = math.isfinite(value)
        if any_process(not finite, self.args.device):
            where = "" if process_count() == 1 else f" in process {process_index()}" if not finite else " in another process"
            raise TrainingError(_not_finite(f"the training loss became {value} at step {self.state.global_step + 1}{where}"))
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures the held-out loss.

        Raises:
            TrainingError: The loss is not finite.
        """
        assert self.model is not None
        metrics = {f"{metric_key_prefix}_loss": self._held_out.loss(self.model, self.state.global_step)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing, because the :class:`~regraft.training.callbacks.Keeper` restores the weights when training begins."""


def _collate_taught(examples: Sequence[Example], padding: int, cache: TeacherCache) -> dict[str, Tensor]:
    return collate(examples, padding) | cache.of(examples)


def _not_finite(what: str) -> str:
    return f"{what}; lower `lr`, raise `warmup` or use `precision=float32`"
