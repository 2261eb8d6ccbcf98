"""The Hugging Face Trainer with three things of our own: an exact held-out loss, a halt on NaN, and our checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from regraft.errors import TrainingError
from regraft.settings import RecoverSettings
from regraft.training.batches import Example, Ordered, collate
from regraft.training.losses import mean_loss
from regraft.training.optimizer import ParameterGroup, make_optimizer


def training_arguments(
    settings: RecoverSettings, work: Path, seed: int, device: torch.device, compute: torch.dtype, *, evaluate_first: bool
) -> TrainingArguments:
    """Writes the settings in the Trainer's words. Checkpoints and the choice of the best one are ours, so both are off here."""
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=compute == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=seed % 2**32,  # the Trainer also seeds NumPy, which takes no more
        # The examples are ordered already, so that resuming only has to skip.
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        eval_on_start=evaluate_first,
        save_strategy="no",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
    )
    # Whatever the environment says (accelerate's launcher can ask for float16), the type is the one that was decided.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise the Trainer would spread each batch over all GPUs with DataParallel
    return arguments


@final
class RecoveryTrainer(Trainer):
    """Trains an adapter.

    Args:
        module: The model with its adapter.
        arguments: From :func:`training_arguments`.
        train: The rows in their order.
        held_out: The rows whose loss chooses the best checkpoint.
        padding: Token that fills up shorter rows.
        groups: All trained parameters with their learning rates.
        callbacks: Ours, after the Trainer's own.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: TrainingArguments,
        train: Ordered,
        held_out: Sequence[Example],
        padding: int,
        groups: Sequence[ParameterGroup],
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=train,
            data_collator=partial(collate, padding=padding),
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self._groups = groups
        rows = arguments.per_device_train_batch_size
        self._held_out = [collate(held_out[start : start + rows], padding) for start in range(0, len(held_out), rows)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer of our groups, once."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._groups)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes one forward and backward pass.

        Raises:
            TrainingError: The loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(_not_finite(f"the training loss became {float(loss)} at step {self.state.global_step + 1}"))
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measures the loss on the held-out rows, every predicted token counted once.

        Raises:
            TrainingError: The loss is not finite.
        """
        assert self.model is not None
        loss = mean_loss(self.model, self._held_out, self.args.device)
        step = self.state.global_step
        if not torch.isfinite(torch.tensor(loss)):
            if step == 0:
                raise TrainingError(
                    f"the held-out loss is {loss} before the first step; the model's weights or its number type are at fault: "
                    "check it with 'regraft evaluate', or use --dtype float32"
                )
            raise TrainingError(_not_finite(f"the held-out loss became {loss} at step {step}"))
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Leaves the weights to the keeper of our checkpoints, which puts them in place when training begins."""


def _not_finite(what: str) -> str:
    return f"{what}; lower --lr, raise --warmup or use --precision float32"
