"""Dtypes of training: bfloat16 autocast on GPUs that support it, else float32; never float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from regraft.errors import InputError

Precision = Literal["auto", "float32", "bfloat16"]


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the matrix products of a forward pass.

    ``auto`` is bfloat16 on a GPU that supports it and float32 elsewhere, because on most CPUs bfloat16 is emulated and slower. float16 is
    not offered, because gradients of Llama-2 exceed its range (LLM-Pruner, issues 13 and 81).

    Raises:
        InputError: bfloat16 was requested on a GPU that lacks it.
    """
    capable = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16":
        if not capable:
            raise InputError(f"`precision=bfloat16` is not supported by {torch.cuda.get_device_name(device)}; use `precision=float32`")
        return torch.bfloat16
    return torch.bfloat16 if precision == "auto" and device.type == "cuda" and capable else torch.float32


@contextmanager
def trainable_weights(model: nn.Module, compute: torch.dtype) -> Iterator[None]:
    """Holds the weights inside the block in dtypes that an adapter can train with, and restores their own dtypes at the end.

    float16 weights become float32. bfloat16 weights become float32 unless the products are bfloat16. Only parameters change: buffers such
    as rotary frequencies remain float32.
    """
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    widened = {torch.float16} if compute == torch.bfloat16 else {torch.float16, torch.bfloat16}
    try:
        for parameter, dtype in before:
            if dtype in widened:
                parameter.data = parameter.data.to(torch.float32)
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)
