"""Models whose layers differ, on the stock layers of transformers.

This file travels with every unevenly pruned model, so it needs nothing but torch, transformers and its neighbour
``configuration_regraft.py``. A model is built as its family builds it; then each layer is built again from its own config. The
mathematics of a layer is therefore the stock class's own, whatever version of transformers is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from .configuration_regraft import (
    RegraftLlamaConfig,
    RegraftMistralConfig,
    RegraftQwen2Config,
    RegraftQwen3Config,
    UnevenConfig,
)

# What `skip` removes from a layer: the part itself and the norms that feed it, by the names that decoder layers give them.
ATTENTION = ("self_attn",)
ATTENTION_NORMS = ("input_layernorm",)
MLP = ("mlp",)
MLP_NORMS = ("post_attention_layernorm",)


class NoAttn(nn.Module):
    """Stands where attention was removed: adds nothing to the residual, but counts the tokens that went by.

    transformers asks the first layer's KV cache how many tokens it has seen. One channel of one head is enough to answer.
    (The name avoids the word that transformers looks for in this file to tell whether the attention kernel can be changed.)

    Args:
        layer_idx: Index of the layer.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **unused: Any) -> tuple[Tensor, None]:
        """Returns zeros.

        Args:
            hidden_states: (batch, tokens, hidden).
            past_key_values: The KV cache, or None.
            unused: Whatever else a layer hands to its attention.
        """
        if past_key_values is not None:
            heads, channels = self._cached_shape(past_key_values)
            batch, tokens = hidden_states.shape[:2]
            nothing = hidden_states.new_zeros(batch, heads, tokens, channels)
            past_key_values.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None

    def _cached_shape(self, cache: Any) -> tuple[int, int]:
        """Returns heads and channels: a cache that was allocated beforehand expects what the config says."""
        layers = getattr(cache, "layers", ())
        if self.layer_idx < len(layers):
            keys = getattr(layers[self.layer_idx], "keys", None)
            if keys is not None and keys.dim() == 4:
                return keys.shape[1], keys.shape[3]
        return 1, 1


class NoMlp(nn.Module):
    """Stands where the feed-forward network was removed: adds nothing to the residual."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns zeros of the shape of ``hidden_states``, (batch, tokens, hidden)."""
        return torch.zeros_like(hidden_states)


def fit_layers(model: PreTrainedModel, config: UnevenConfig) -> None:
    """Gives a model that was built from an even config the layers of an uneven one.

    Args:
        model: With ``layers`` in its base model.
        config: What it is to become.
    """
    # Chosen while the even model was built, on its own copy of the config.
    config.__dict__["_attn_implementation_internal"] = model.config._attn_implementation_internal
    base: Any = model.base_model
    model.config = base.config = config  # pyright: ignore[reportAttributeAccessIssue]
    layers = base.layers
    for index in range(len(layers)):
        layer_config: Any = config.layer(index)
        layers[index] = layer = type(layers[index])(layer_config, index)
        if "attention" in layer_config.skip:
            _replace(layer, ATTENTION, lambda index=index: NoAttn(index))
            _replace(layer, ATTENTION_NORMS, nn.Identity)
        if "mlp" in layer_config.skip:
            _replace(layer, MLP, NoMlp)
            _replace(layer, MLP_NORMS, nn.Identity)
    model.post_init()


def _replace(layer: nn.Module, names: tuple[str, ...], make: Any) -> None:
    for name in names:
        if name in layer._modules:
            setattr(layer, name, make())


class Uneven:
    """Builds a model of a family with the layers that an uneven config describes; mixed in before the family's own class."""

    def __init__(self, config: UnevenConfig) -> None:
        super().__init__(config.even())  # pyright: ignore[reportCallIssue]
        fit_layers(self, config)  # pyright: ignore[reportArgumentType]


class RegraftLlamaModel(Uneven, LlamaModel):  # noqa: D101
    config_class = RegraftLlamaConfig
    _auto_class = "AutoModel"


class RegraftLlamaForCausalLM(Uneven, LlamaForCausalLM):  # noqa: D101
    config_class = RegraftLlamaConfig
    _auto_class = "AutoModelForCausalLM"


class RegraftMistralModel(Uneven, MistralModel):  # noqa: D101
    config_class = RegraftMistralConfig
    _auto_class = "AutoModel"


class RegraftMistralForCausalLM(Uneven, MistralForCausalLM):  # noqa: D101
    config_class = RegraftMistralConfig
    _auto_class = "AutoModelForCausalLM"


class RegraftQwen2Model(Uneven, Qwen2Model):  # noqa: D101
    config_class = RegraftQwen2Config
    _auto_class = "AutoModel"


class RegraftQwen2ForCausalLM(Uneven, Qwen2ForCausalLM):  # noqa: D101
    config_class = RegraftQwen2Config
    _auto_class = "AutoModelForCausalLM"


class RegraftQwen3Model(Uneven, Qwen3Model):  # noqa: D101
    config_class = RegraftQwen3Config
    _auto_class = "AutoModel"


class RegraftQwen3ForCausalLM(Uneven, Qwen3ForCausalLM):  # noqa: D101
    config_class = RegraftQwen3Config
    _auto_class = "AutoModelForCausalLM"


# `_auto_class` above makes `save_pretrained` copy this file and its neighbour into the folder.
MODELS = (
    (RegraftLlamaConfig, RegraftLlamaModel, RegraftLlamaForCausalLM),
    (RegraftMistralConfig, RegraftMistralModel, RegraftMistralForCausalLM),
    (RegraftQwen2Config, RegraftQwen2Model, RegraftQwen2ForCausalLM),
    (RegraftQwen3Config, RegraftQwen3Model, RegraftQwen3ForCausalLM),
)
