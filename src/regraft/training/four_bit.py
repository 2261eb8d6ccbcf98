"""Frozen weights in four bits while an adapter trains beside them (QLoRA, Dettmers et al., arXiv 2305.14314, section 3).

The linear maps of the layers are held as NF4 with their scales quantised once more, by bitsandbytes. As they were, they wait on the CPU and
come back afterwards: what the adapter is folded into, and what is saved, has lost nothing. That is our departure from QLoRA, which
goes on with the quantised base; the price is that the adapter has learnt beside slightly other weights than it ends up beside.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from regraft.errors import InputError, MissingDependencyError

_EXTRA = "bnb"
_SHARDS = "ACCELERATE_USE_FSDP"  # how its launcher asks for FSDP


def import_bitsandbytes() -> Any:
    """Returns the library.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingDependencyError("bitsandbytes", _EXTRA) from None


def check_four_bits(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Refuses what :func:`in_four_bits` cannot do, before anything is changed.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        InputError: It does not work on this device, the model has nothing that it can hold, or the weights are to lie in shards.
    """
    library = import_bitsandbytes()
    if os.environ.get(_SHARDS, "false") == "true":
        raise InputError("--load-in-4bit keeps the weights whole in every process and FSDP shards them; leave one of the two out")
    if not _linear_maps(model):
        raise InputError(f"--load-in-4bit finds no nn.Linear in the layers of {type(model).__name__}; leave it out")
    try:
        _quantised(library, nn.Linear(64, 64, bias=False, device=model.device), compute)(
            torch.zeros(1, 64, dtype=compute, device=model.device)
        )
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"bitsandbytes does not work on {model.device} here ({reason}); leave out --load-in-4bit") from None


@contextmanager
def in_four_bits(model: PreTrainedModel, compute: torch.dtype) -> Iterator[None]:
    """Holds the frozen linear maps of a model in four bits inside the block, all but the one that makes the logits.

    Args:
        model: With an adapter inside, whose own parameters stay as they are.
        compute: Type of the matrix products.
    """
    library, device = import_bitsandbytes(), model.device
    frozen = {name: module for name, module in _linear_maps(model).items() if not module.weight.requires_grad}
    try:
        for name, module in frozen.items():
            model.set_submodule(name, _quantised(library, module, compute))
            module.to("cpu")
        yield
    finally:
        for name, module in frozen.items():
            model.set_submodule(name, module.to(device))


def _linear_maps(model: PreTrainedModel) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}


def _quantised(library: Any, module: nn.Linear, compute: torch.dtype) -> nn.Module:
    """Returns a linear map of bitsandbytes with the same weight, NF4 in blocks of 64, and the same bias."""
    shape = (module.in_features, module.out_features)
    how = {"quant_type": "nf4", "compress_statistics": True}
    made = library.nn.Linear4bit(*shape, bias=False, compute_dtype=compute, device="meta", **how)
    made.weight = library.nn.Params4bit(module.weight.data.to(compute), requires_grad=False, **how).to(module.weight.device)
    made.bias = module.bias
    return made.train(module.training)
