"""Compute in float32 for a while with a model whose weights are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[None]:
    """Holds the weights of a model on the CPU in float32; afterwards they are of their own types again, bit for bit.

    A CPU without instructions for bfloat16 takes thirty times as long for a backward pass in it, and the sums are no better for it. On a
    GPU nothing is changed. Weights must not be changed meanwhile: what float32 adds would be lost.
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
