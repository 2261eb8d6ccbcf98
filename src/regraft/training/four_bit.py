"""Frozen weights in four bits during the training of an adapter (QLoRA, Dettmers et al., arXiv 2305.14314, section 3).

The linear maps of the layers are quantised by bitsandbytes to NF4 with double quantisation. The original weights wait on the CPU and are
restored at the end, so that merging and saving use the exact weights. This departs from QLoRA, which keeps the quantised base; the
disadvantage is that the adapter was trained with slightly different weights.
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
_SHARDS = "ACCELERATE_USE_FSDP"  # environment variable by which accelerate's launcher requests FSDP


def import_bitsandbytes() -> Any:
    """Returns the module ``bitsandbytes``.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingDependencyError("bitsandbytes", _EXTRA) from None


def check_four_bits(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Checks that :func:`in_four_bits` can work, before anything is changed.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        InputError: bitsandbytes does not work on this device, the model has no linear maps to quantise, or FSDP is requested.
    """
    library = import_bitsandbytes()
    if os.environ.get(_SHARDS, "false") == "true":
        raise InputError("`load_in_4bit` keeps the weights whole in every process and FSDP shards them; leave one of the two out")
    if not _linear_maps(model):
        raise InputError(f"`load_in_4bit` finds no nn.Linear in the layers of {type(model).__name__}; leave it out")
    try:
        _quantised(library, nn.Linear(64, 64, bias=False, device=model.device), compute)(
            torch.zeros(1, 64, dtype=compute, device=model.device)
        )
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"bitsandbytes does not work on {model.device} here ({reason}); leave out `load_in_4bit`") from None


@contextmanager
def in_four_bits(model: PreTrainedModel, compute: torch.dtype) -> Iterator[None]:
    """Holds the frozen linear maps of a model, except the output projection, in four bits inside the block.

    Args:
        model: A model with an adapter, whose parameters are not quantised.
        compute: Dtype of matrix products.
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
    """Returns a bitsandbytes linear map with the same bias, and with the weight as NF4 in blocks of 64."""
    shape = (module.in_features, module.out_features)
    how = {"quant_type": "nf4", "compress_statistics": True}
    made = library.nn.Linear4bit(*shape, bias=False, compute_dtype=compute, device="meta", **how)
    made.weight = library.nn.Params4bit(module.weight.data.to(compute), requires_grad=False, **how).to(module.weight.device)
    made.bias = module.bias
    return made.train(module.training)
