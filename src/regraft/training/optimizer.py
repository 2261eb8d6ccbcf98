"""The optimizer, its groups of parameters by learning rate, and the schedule of the rates, which is that of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from regraft.adapters import Grouped, ParameterGroup
from regraft.errors import InputError
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import Injected

RateSchedule = Literal["cosine", "linear", "constant"]

_LORA_B = ("lora_B", "lora_embedding_B")


def parameter_groups(injected: Injected, settings: RecoverSettings) -> list[ParameterGroup]:
    """Returns the parameter groups of an adapter: its own groups, those of LoRA+, or a single group.

    In LoRA+ (arXiv 2402.12354, section 4), B has ``lr_ratio`` times the learning rate of A.

    Raises:
        InputError: LoRA+ was requested for an adapter without a matrix B, or for one with its own groups.
    """
    trained = {name: parameter for name, parameter in injected.module.named_parameters() if parameter.requires_grad}
    if isinstance(injected.adapter, Grouped):
        if settings.lr_ratio != 1.0:
            raise InputError(
                f"`lr_ratio={settings.lr_ratio}` belongs to LoRA+, and adapter '{settings.adapter}' has its own ratio; "
                "leave `lr_ratio` at 1"
            )
        return list(injected.adapter.parameter_groups(injected.module, settings.lr))
    lr = settings.lr if settings.lr is not None else injected.adapter.defaults.lr
    if settings.lr_ratio == 1.0:
        return [ParameterGroup(tuple(trained.values()), lr)]
    second = tuple(parameter for name, parameter in trained.items() if any(f".{part}." in name for part in _LORA_B))
    if not second:
        raise InputError(
            f"`lr_ratio={settings.lr_ratio}` belongs to LoRA+, and adapter '{settings.adapter}' has no matrix B; leave `lr_ratio` at 1"
        )
    chosen = set(map(id, second))
    first = tuple(parameter for parameter in trained.values() if id(parameter) not in chosen)
    return [ParameterGroup(first, lr), ParameterGroup(second, lr * settings.lr_ratio)]


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
    """Returns AdamW without weight decay and with betas 0.9 and 0.999, like the Trainer's, with these groups."""
    return torch.optim.AdamW(**optimizer_arguments(groups))


def optimizer_arguments(groups: Sequence[ParameterGroup]) -> dict[str, Any]:
    """Returns the arguments of AdamW for :func:`make_optimizer`, and for a Trainer, which makes the optimizer itself."""
    entries = [
        {"params": list(group.parameters), "lr": group.lr, **({"eps": group.eps} if group.eps is not None else {})} for group in groups
    ]
    return {"params": entries, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def scheduler_name(schedule: RateSchedule) -> str:
    """Returns the name that a schedule with warm-up has in transformers."""
    return "constant_with_warmup" if schedule == "constant" else schedule


@cache
def rate_shape(schedule: RateSchedule, warm: int, steps: int) -> Callable[[int], float]:
    """Returns the function of transformers from the index of a step to the learning rate, as a share of the peak.

    Args:
        schedule: The shape after the warm-up.
        warm: Number of steps of the warm-up.
        steps: Number of all steps.
    """
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(scheduler_name(schedule), unused, num_warmup_steps=warm, num_training_steps=steps)
    assert isinstance(scheduler, LambdaLR)
    return scheduler.lr_lambdas[0]
