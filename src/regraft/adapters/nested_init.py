"""First values of LoRA that do not depend on the rank: the same module and seed give the leading rows of one matrix at every rank.

Two rank plans of one seed then start from the same values as far as both go, and so do their recoveries: what differs afterwards is
the ranks' doing, not the draw's. The distribution is that of [HU21] as PEFT and its authors draw it, since the bound of Kaiming's
uniform distribution with a = sqrt(5) depends on the width of the input alone.

References:
    [HU21] LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor

from regraft.adapters.contract import AdapterRequest, Evidence
from regraft.adapters.peft_backed import NAME, layers_of
from regraft.adapters.seeding import derived_seed


def first_rows(name: str, rank: int, columns: int, seed: int) -> Tensor:
    """Returns LoRA's A of one module, ``(rank, columns)`` float32, uniform in ``±1/sqrt(columns)``.

    Args:
        name: Of the module.
        rank: How many rows; fewer of them are the leading rows of more.
        columns: Input features.
        seed: Of the adapter.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "rows", name))
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def shared_start(model: PeftModel, request: AdapterRequest, evidence: Evidence | None) -> None:
    """Gives every linear layer of PEFT's LoRA those rows; an adapted embedding keeps PEFT's start, where B is what is drawn."""
    for name, layer in layers_of(model):
        if NAME in layer.lora_A:
            weight: Tensor = layer.lora_A[NAME].weight
            rank, columns = weight.shape
            weight.data.copy_(first_rows(name, rank, columns, request.seed))
