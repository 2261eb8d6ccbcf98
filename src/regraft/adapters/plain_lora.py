"""A plain LoRA in the form that every runtime reads: one rank, with alpha equal to it.

Inference servers read less than PEFT: one applies a single alpha / r to all modules and ignores ``rank_pattern`` and ``alpha_pattern``;
another reads only ``lora_A`` and ``lora_B``. Therefore smaller ranks are padded with zeros to the largest, alpha equals the rank, the
scale is multiplied into B, and there is no bias, no pattern and no rsLoRA.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from regraft.adapters.contract import LowRank
from regraft.adapters.linear_like import is_table, is_transposed
from regraft.models.classifier import head_modules, head_parameters
from regraft.reading import text_in

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what PEFT puts before the names of the base's own tensors


def write_plain_lora(
    factors: Mapping[str, LowRank],
    modules: Mapping[str, nn.Module],
    names: Iterable[str],
    folder: Path,
    base: str,
    task_type: str | None,
    head: Mapping[str, Tensor] | None = None,
) -> int:
    """Writes factors as a PEFT adapter.

    Args:
        factors: Factors of every adapted module by full name; at least one.
        modules: The plain modules by the same names.
        names: Names of all modules of the model.
        folder: An empty folder.
        base: Base model, as its users name it.
        task_type: PEFT's name of the task.
        head: Parameters of a classification or regression head that was trained completely.

    Returns:
        The rank of the adapter.
    """
    head = head or {}
    rank = max(factor.right.shape[0] for factor in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        missing = rank - factor.right.shape[0]
        right, left = pad(factor.right, (0, 0, 0, missing)), pad(factor.left, (0, missing))
        first, second = ("lora_embedding_A", "lora_embedding_B") if is_table(modules[name]) else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PEFT_PREFIX}{name}.{first}"] = right.to("cpu").contiguous()
        tensors[f"{PEFT_PREFIX}{name}.{second}"] = left.to("cpu").contiguous()
    tensors |= {f"{PEFT_PREFIX}{name}": value.detach().to("cpu").contiguous() for name, value in head.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=target_names(factors, names),
        fan_in_fan_out=any(is_transposed(modules[name]) for name in factors),
        bias="none",
        modules_to_save=head_modules(head) or None,
        task_type=cast(Any, task_type),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    tidy_config(folder / CONFIG)
    return rank


def tidy_config(path: Path) -> None:
    """Sorts the config of a PEFT adapter, because PEFT writes sets in an order that depends on the process's hash seed."""
    values = {key: _ordered(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ordered(value: object) -> object:
    match value:
        case list() if all(text_in(entry) is not None for entry in value):
            return sorted(value)
        case _:
            return value


def task_type_of(model: PreTrainedModel) -> str | None:
    """Returns PEFT's name for the task of a model, or None."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if model.can_generate() else None


def saved_whole(model: PreTrainedModel) -> list[str] | None:
    """Returns the modules that PEFT trains and saves completely: those of a classification head; None for other models."""
    return head_modules(name for name, _ in head_parameters(model)) or None


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
