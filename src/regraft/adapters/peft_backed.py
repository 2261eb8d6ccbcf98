"""Adapters that PEFT has, by a function that makes their PEFT config."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from regraft.adapters.contract import ADAPTERS, AdapterRequest
from regraft.adapters.isolation import isolated


@final
@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that PEFT builds, merges and saves.

    Attributes:
        config: Makes the PEFT config from what is asked and from the names of all modules of the model.
    """

    config: Callable[[AdapterRequest, tuple[str, ...]], PeftConfig]

    def attach(self, model: PreTrainedModel, request: AdapterRequest) -> nn.Module:
        """Returns a ``PeftModel`` around the model; see :class:`~regraft.adapters.contract.Adapter`."""
        names = tuple(name for name, _ in model.named_modules())
        with isolated(request.seed), warnings.catch_warnings():
            # PEFT 0.21 asks for a property that transformers 5.23 renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return get_peft_model(model, self.config(request, names))

    def merge(self, adapted: nn.Module) -> PreTrainedModel:
        """Folds the factors into each weight in float32 and casts back, one module at a time."""
        peft_model = cast(PeftModel, adapted)
        for module in peft_model.modules():
            if isinstance(module, BaseTunerLayer):
                base = cast(nn.Linear, module.get_base_layer())
                dtype = base.weight.dtype
                # PEFT adds in the dtype of the weight; in bfloat16 the sum would be rounded twice.
                base.weight.data = base.weight.data.to(torch.float32)
                cast(Any, module).merge()
                base.weight.data = base.weight.data.to(dtype)
        return cast(Any, peft_model.base_model).unload()

    def save(self, adapted: nn.Module, folder: Path, base: str) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` as stock PEFT reads them."""
        peft_model = cast(PeftModel, adapted)
        peft_model.peft_config["default"].base_model_name_or_path = base
        # Adapted layers are never embeddings; "auto" would ask the hub for the base model's vocabulary.
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        config = folder / "adapter_config.json"
        # PEFT writes sets in the order of this process's hash seed; sorted, the same adapter is the same bytes.
        values = {key: _ordered(value) for key, value in json.loads(config.read_text(encoding="utf-8")).items()}
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ordered(value: object) -> object:
    strings = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return sorted(cast(list[str], value)) if strings else value


def target_names(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """Returns the shortest names that PEFT matches to exactly the wanted modules.

    The last part of a name (``q_proj``) stands for all modules that end with it, which is what runtimes that load adapters
    expect; it is used when every module with that ending is wanted, else the full names are.

    >>> target_names(["a.0.q", "a.1.q", "a.0.v"], ["a", "a.0", "a.0.q", "a.0.v", "a.1", "a.1.q", "a.1.v"])
    ['a.0.v', 'q']
    """
    chosen = sorted(set(wanted))
    endings = Counter(name.rpartition(".")[2] for name in names)
    wanted_endings = Counter(name.rpartition(".")[2] for name in chosen)
    whole = {ending for ending, count in wanted_endings.items() if endings[ending] == count}
    return sorted({ending if (ending := name.rpartition(".")[2]) in whole else name for name in chosen})


def lora_config(request: AdapterRequest, names: tuple[str, ...]) -> LoraConfig:
    """LoRA (arXiv 2106.09685): ``W + alpha/r * B A``, B ``(out, r)`` from zero, A ``(r, in)`` Kaiming uniform.

    The most common rank and alpha are the config's, the others its patterns, so that a uniform plan needs no pattern.
    """
    rank = Counter(request.ranks.values()).most_common(1)[0][0]
    alpha = Counter(request.alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, _whole(alpha)),
        lora_dropout=request.dropout,
        target_modules=target_names(request.ranks, names),
        rank_pattern={name: value for name, value in request.ranks.items() if value != rank},
        alpha_pattern=cast(dict[str, int], {name: _whole(value) for name, value in request.alphas.items() if value != alpha}),
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def _whole(alpha: float) -> float | int:
    """Writes a whole alpha as an integer, which is what readers of the config expect."""
    return int(alpha) if alpha == int(alpha) else alpha


ADAPTERS.add("lora", PeftAdapter(lora_config))
