"""AdaLoRA: singular triplets whose number follows the loss (Zhang et al., arXiv 2303.10512), as PEFT has it.

The change of a weight is ``alpha/r * B diag(E) A``. It starts above the rank that is asked for, and entries of E are zeroed by sensitivity
until the mean rank over all modules is the one asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast, final

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters.contract import ADAPTERS, AdapterRequest, Defaults, Evidence, LowRank
from regraft.adapters.peft_backed import NAME, PeftAdapter, factors_of, layers_of
from regraft.adapters.peft_kinds import stored_in_other_order, whole_number
from regraft.adapters.plain_lora import saved_whole, target_names, task_type_of
from regraft.errors import InputError
from regraft.settings import Positive, Settings

ORTHOGONAL = 0.5  # weight of the penalty, PEFT's default
_RANKS, _BETWEEN = "ranks", "::"


class AdaLoraOptions(Settings):
    """Settings of AdaLoRA, as in the paper: a start above the budget, then ranks are pruned to it."""

    init_factor: float = Field(default=1.5, ge=1.0, le=8.0, description="first rank over the rank that is asked for")
    warm: float = Field(default=0.1, ge=0.0, lt=0.5, description="share of the steps before ranks are pruned")
    settle: float = Field(default=0.3, ge=0.0, lt=0.5, description="share of the steps after ranks are settled")
    every: Positive = Field(default=5, description="steps between two moves of the budget")


def adalora_config(request: AdapterRequest, model: PreTrainedModel) -> AdaLoraConfig:
    """Returns PEFT's config.

    Raises:
        InputError: Ranks differ from module to module, which AdaLoRA finds by itself, or the steps are not known.
    """
    options = cast(AdaLoraOptions, request.options)
    ranks = sorted(set(request.ranks.values()))
    if len(ranks) > 1:
        raise InputError(f"adapter 'adalora' finds its own ranks, but the plan gives {ranks[0]} to {ranks[-1]}; use `rank`")
    if request.steps < 1:
        raise InputError("adapter 'adalora' needs the number of optimizer steps; give `steps`")
    rank, steps, settled = ranks[0], request.steps, round(options.settle * request.steps)
    if steps - settled < 2:
        raise InputError(f"adapter 'adalora' has {steps - settled} of {steps} steps before its ranks settle, too few; give more `steps`")
    return AdaLoraConfig(
        init_r=max(rank, round(options.init_factor * rank)),
        target_r=rank,
        tinit=round(options.warm * steps),
        tfinal=settled,
        deltaT=options.every,
        total_step=steps,
        orth_reg_weight=0.0,  # the trainer adds the penalty, once a step
        lora_alpha=cast(int, whole_number(next(iter(request.alphas.values())))),
        lora_dropout=request.dropout,
        target_modules=target_names(request.ranks, [name for name, _ in model.named_modules()]),
        fan_in_fan_out=stored_in_other_order(model, request.ranks),
        bias="none",
        modules_to_save=saved_whole(model),
        task_type=task_type_of(model),
    )


@final
class AdaLora:
    """An adapter of PEFT, with what AdaLoRA does while it trains."""

    options = AdaLoraOptions
    defaults = Defaults(lr=2e-3)

    def __init__(self) -> None:
        self._stock = PeftAdapter(adalora_config, options=self.options, defaults=self.defaults)

    def attach(self, model: PreTrainedModel, request: AdapterRequest, evidence: Evidence | None) -> nn.Module:
        """Returns a ``PeftModel`` around the model; see :class:`~regraft.adapters.contract.Adapter`."""
        return self._stock.attach(model, request, evidence)

    def after_step(self, adapted: nn.Module, step: int) -> None:
        """Moves the budget: prunes the entries of E that matter least, as far as the schedule says."""
        _base(adapted).update_and_allocate(step)

    def penalty(self, adapted: nn.Module) -> Tensor:
        """Returns how far the factors are from orthogonal (equation 4), as PEFT weighs it.

        PEFT adds it to every loss that the model returns: to a held-out one as well, and as often as a step has forward passes.
        """
        products: list[Tensor] = []
        for _, layer in layers_of(cast(PeftModel, adapted)):
            first, second = factors_of(layer)
            products += [first @ first.T, second.T @ second]
        return ORTHOGONAL * torch.stack([torch.linalg.matrix_norm(one - torch.eye(len(one)).to(one)) for one in products]).mean()

    def state(self, adapted: nn.Module) -> dict[str, Tensor]:
        """Returns how sensitive the loss is to each entry, and which ranks are pruned: what the schedule goes on from."""
        base = _base(adapted)
        kept: dict[str, list[bool]] = dict(_config_of(base).rank_pattern or {})
        found = {f"{part}{_BETWEEN}{name}": value for part, values in _sensitivity(base).items() for name, value in values.items()}
        return found | {f"{_RANKS}{_BETWEEN}{name}": torch.tensor(value) for name, value in kept.items()}

    def put_state(self, adapted: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Puts back what :meth:`state` returned."""
        base = _base(adapted)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_sensitivity(base), _RANKS)}
        devices = {name: parameter.device for name, parameter in base.model.named_parameters()}
        for key, value in state.items():
            part, _, name = key.partition(_BETWEEN)
            parts[part][name] = value.to(devices[name])
        allocator = base.rankallocator
        allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = parts["ipt"], parts["exp_avg_ipt"], parts["exp_avg_unc"]
        _config_of(base).rank_pattern = {name: value.tolist() for name, value in parts[_RANKS].items()}

    def finish(self, adapted: nn.Module) -> None:
        """Writes the ranks of the weights that are kept into the config: they may be of a step before the last ranks were pruned."""
        ranks = {f"{name}.lora_E.{NAME}": layer.lora_E[NAME] for name, layer in layers_of(cast(PeftModel, adapted))}
        _config_of(_base(adapted)).rank_pattern = {name: (value != 0).flatten().tolist() for name, value in ranks.items()}

    def factors(self, adapted: nn.Module) -> dict[str, LowRank]:
        """Returns B and diag(E) A of every module, the scale in B."""
        return self._stock.factors(adapted)

    def merge(self, adapted: nn.Module) -> PreTrainedModel:
        """Folds the factors into each weight in float32 and casts back, one module at a time."""
        return self._stock.merge(adapted)

    def save(self, adapted: nn.Module, folder: Path, base: str) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as stock PEFT reads them."""
        self._stock.save(adapted, folder, base)


def _base(adapted: nn.Module) -> AdaLoraModel:
    return cast(AdaLoraModel, cast(PeftModel, adapted).base_model)


def _config_of(base: AdaLoraModel) -> AdaLoraConfig:
    """Returns the config, whose pattern of ranks, which of them are left by the name of each E, changes as it trains."""
    return cast(AdaLoraConfig, base.peft_config[NAME])


def _sensitivity(base: AdaLoraModel) -> dict[str, dict[str, Tensor]]:
    """Returns what PEFT's allocator remembers of the gradients, by its own names (equations 8 to 10)."""
    allocator = base.rankallocator
    return {"ipt": allocator.ipt, "exp_avg_ipt": allocator.exp_avg_ipt, "exp_avg_unc": allocator.exp_avg_unc}


ADAPTERS.add("adalora", AdaLora())
