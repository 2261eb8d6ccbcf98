"""Tells an adapter of every optimizer step: AdaLoRA moves its ranks then."""

from __future__ import annotations

from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regraft.surgery.adapters import Injected


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
