"""Nested initial values of LoRA: for one module and seed, the A of every rank is the leading rows of one matrix.

Recoveries of two rank plans with one seed then start from the same values in their common rows, so that the difference of their results is
due to the ranks and not to the draw. The distribution is that of [HU21] and PEFT, because the bound of Kaiming's uniform distribution with
a = sqrt(5) depends only on the input width.

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
        name: Name of the module.
        rank: Number of rows.
        columns: Number of input features.
        seed: Seed of the adapter.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "rows", name))
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)


def shared_start(model: PeftModel, request: AdapterRequest, evidence: Evidence | None) -> None:
    """Sets A of every linear layer of PEFT's LoRA to :func:`first_rows`; an embedding keeps PEFT's start, which draws B."""
    for name, layer in layers_of(model):
        if NAME in layer.lora_A:
            weight: Tensor = layer.lora_A[NAME].weight
            rank, columns = weight.shape
            weight.data.copy_(first_rows(name, rank, columns, request.seed))
