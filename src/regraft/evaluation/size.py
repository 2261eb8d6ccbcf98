"""Size of a model: parameters, bytes, and multiply-accumulates, counted from its actual modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regraft.models.family import family_of
from regraft.models.view import parameter_count
from regraft.plans import SizeReport


def measure_size(model: PreTrainedModel | PeftModel, folder: Path | None, context_tokens: int) -> SizeReport:
    """Measures the size of a model.

    Args:
        model: A model of a known family, with or without adapters.
        folder: Folder with the model's safetensors files; None when it was never saved.
        context_tokens: Number of tokens that each token attends to, itself included.

    Raises:
        ModelError: The family is not known.
    """
    return SizeReport(
        parameters=parameter_count(model),
        bytes_on_disk=sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors"))) if folder else 0,
        bytes_in_memory=bytes_in_memory(model),
        macs_per_token=macs_per_token(model, context_tokens),
        context_tokens=context_tokens,
    )


def bytes_in_memory(model: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers, counting tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def macs_per_token(model: PreTrainedModel | PeftModel, context_tokens: int) -> int:
    """Returns the number of multiply-accumulates in one token's forward pass.

    Every linear module counts its weights once; this includes an output head that shares them with the embedding. Attention counts two
    products (scores and weighted values) of the query width with each attended token: ``context_tokens``, or the sliding window if it is
    shorter. Norms, activations, rotary embeddings and the embedding's look-up are not counted.
    """
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    return linear + sum(2 * width * min(context_tokens, span or context_tokens) for width, span in _attentions(model))


def _attentions(model: PreTrainedModel | PeftModel) -> list[tuple[int, int | None]]:
    """Returns, for every layer with attention, the channels of all query heads and the sliding window or None."""
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    family = family_of(base.config.model_type)
    outputs = [
        axis.module
        for coupling in family.couplings
        for axis in coupling.axes
        if axis.side == "in" and axis.block in ("head", "query_group") and axis.module.startswith(f"{family.attention}.")
    ]
    found: list[tuple[int, int | None]] = []
    for index, layer in enumerate(base.get_submodule(family.layers).children()):
        for output in outputs:
            module = dict(layer.named_modules()).get(output)
            if module is not None:  # else the layer's attention was removed
                found.append((_inputs(module), _sliding_window(base, index)))
    return found


def _inputs(module: nn.Module) -> int:
    """Returns the number of input channels of a projection, also when an adapter wraps it."""
    return cast(int, module.nx if isinstance(module, Conv1D) else module.in_features)


def _sliding_window(model: PreTrainedModel, layer: int) -> int | None:
    """Returns the sliding window of a layer, in tokens, or None for full attention."""
    config: dict[str, Any] = model.config.to_dict()
    window, types = config.get("sliding_window"), config.get("layer_types")
    if window is None or (types is not None and types[layer] != "sliding_attention"):
        return None
    return int(window)
