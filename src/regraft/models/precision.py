"""Compute in float32 for a while with a model whose weights are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[None]:
    """Holds the weights of a model on the CPU in float32; afterwards they are of their own types again, bit for bit.

    A CPU without instructions for bfloat16 takes four times as long for a forward pass in it, and thirty times for one back, and the sums
    are no better for it. On a GPU nothing is changed. Weights that are changed meanwhile are rounded in the end: see :func:`round_weights`.
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
    """Rounds weights to what a type of fewer bits can hold, in the type that they have, so that what is computed with is what is saved."""
    for parameter in module.parameters():
        if parameter.dtype != dtype and any(parameter.stride()):  # without strides it is one number for all, and may not be written to
            parameter.copy_(parameter.to(dtype))
