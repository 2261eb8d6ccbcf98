"""The Hugging Face Trainer with an exact held-out loss, a stop on NaN, distillation, and our own checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from regraft.compat import train_on_one_gpu
from regraft.errors import TrainingError
from regraft.surgery.adapters import Injected
from regraft.training.batches import Example, collate
from regraft.training.distributed import any_process, is_sharded, process_count, process_index, sum_over_processes
from regraft.training.job import Job, Objective
from regraft.training.optimizer import ParameterGroup, make_optimizer, scheduler_name
from regraft.training.teacher_cache import TeacherCache

_CHECKPOINTING: dict[str, Any] = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


def training_arguments(job: Job) -> TrainingArguments:
    """Writes a job in the Trainer's words. Checkpoints and the choice of the best one are ours, so both are off here."""
    settings, device = job.settings, job.model.device
    arguments = TrainingArguments(
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
        **(_CHECKPOINTING if settings.gradient_checkpointing else {}),
    )
    # The chosen dtype takes precedence over the environment (accelerate's launcher can request float16).
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    train_on_one_gpu(arguments)
    return arguments


@final
class RecoveryTrainer(Trainer):
    """The trainer of an adapter.

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
        objective: Objective | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        collate_rows, padding = job.reading.collate, job.padding
        super().__init__(
            model=injected.module,
            args=training_arguments(job),
            train_dataset=job.rows,
            data_collator=(partial(_collate_taught, padding=padding, cache=cache) if cache else lambda rows: collate_rows(rows, padding)),
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self._groups = groups
        self._summed = job.reading.summed
        self._objective = objective or job.reading.objective
        self._penalty = partial(injected.adapter.penalty, injected.module)
        if self._objective is not None:
            self.model_accepts_loss_kwargs = True  # our loss is told how much all passes of a step predict
        size = job.settings.batch
        self._held_out = [collate_rows(job.held_out[start : start + size], padding) for start in range(0, len(job.held_out), size)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer with our groups, once."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._groups)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Makes one forward and backward pass.

        Raises:
            TrainingError: The loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        finite = bool(torch.isfinite(loss))
        if any_process(not finite, self.args.device):
            where = "" if process_count() == 1 else f" in process {process_index()}" if not finite else " in another process"
            raise TrainingError(_not_finite(f"the training loss became {float(loss)} at step {self.state.global_step + 1}{where}"))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of one forward pass, as a part of the mean over all predicted tokens of the step in all processes."""
        assert not return_outputs
        if self._objective is None:
            loss = cast(Tensor, super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch))
        else:
            assert num_items_in_batch is not None
            # The gradients of all processes are averaged, but the gradient of the sum of their losses is needed.
            loss = self._objective(model, inputs) / num_items_in_batch * process_count()
        penalty = self._penalty()  # its gradients are averaged over processes too, and summed over the passes of a step
        return loss if penalty is None else loss + penalty / self.args.gradient_accumulation_steps

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures the mean loss over all predicted tokens of the held-out rows.

        Raises:
            TrainingError: The loss is not finite.
        """
        assert self.model is not None
        loss = self._held_out_loss()
        step = self.state.global_step
        if not torch.isfinite(torch.tensor(loss)):
            if step == 0:
                raise TrainingError(
                    f"the held-out loss is {loss} before the first step; the model's weights or its number type are at fault: "
                    "check it with 'regraft evaluate', or use `dtype=float32`"
                )
            raise TrainingError(_not_finite(f"the held-out loss became {loss} at step {step}"))
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_loss(self) -> float:
        assert self.model is not None
        mine = self._held_out[process_index() :: process_count()]
        if is_sharded(self.model) and len(mine) < -(-len(self._held_out) // process_count()):
            self._summed(self.model, self._held_out[:1], self.args.device)  # all processes must gather the shards equally often
        total, count = sum_over_processes(self._summed(self.model, mine, self.args.device), self.args.device)
        return total / count

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing, because the :class:`~regraft.training.callbacks.Keeper` restores the weights when training begins."""


def _collate_taught(examples: Sequence[Example], padding: int, cache: TeacherCache) -> dict[str, Tensor]:
    return collate(examples, padding) | cache.of(examples)


def _not_finite(what: str) -> str:
    return f"{what}; lower `lr`, raise `warmup` or use `precision=float32`"
