"""Temporary computation in float32, for a model whose weights have fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[None]:
    """Holds a model's CPU weights in float32 inside the block; at the end they have their own dtypes and bits again.

    On a CPU without bfloat16 instructions, a forward pass in bfloat16 takes four times as long and a backward pass thirty times, without
    any benefit. Weights on a GPU are not changed. Weights that change inside the block are rounded at the end: see :func:`round_weights`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [
        (tensor, tensor.dtype) for tensor in tensors if tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds weights to values of a dtype with fewer bits, in their present dtype, so that computations use the values that are saved."""
    for parameter in module.parameters():
        if parameter.dtype != dtype and any(parameter.stride()):  # a parameter without strides is one expanded number and read-only
            parameter.copy_(parameter.to(dtype))
