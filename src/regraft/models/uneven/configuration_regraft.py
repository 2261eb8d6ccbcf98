"""Configs of models whose layers differ: per-layer head counts and feed-forward widths, attention or feed-forward removed.

This file travels with every unevenly pruned model, so it needs nothing but transformers. Layers that differ from the rest are
listed under ``per_layer_config``, a sparse mapping from layer index to what is different there::

    {"1": {"intermediate_size": 96}, "2": {"num_attention_heads": 3, "num_key_value_heads": 3}, "27": {"skip": ["attention"]}}

``skip`` takes ``attention`` and ``mlp``: the part and its norms are gone from that layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("a model with per-layer sizes needs transformers 5.15 or later; get it with: pip install -U transformers")

# Called once, before the first config is made: where regraft is installed it makes the Auto classes know the models here.
BEFORE_FIRST_CONFIG: list[Callable[[], None]] = []


class UnevenConfig:
    """What turns the config of a family into one with per-layer sizes; mixed in before the family's own config class."""

    model_type: str
    _auto_class = "AutoConfig"  # makes `save_pretrained` copy this file into the folder

    def __post_init__(self, **kwargs: Any) -> None:
        while BEFORE_FIRST_CONFIG:
            BEFORE_FIRST_CONFIG.pop()()
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # Set here and not only on saving, so that the code is found however the config reaches a folder. The order of the three
        # matters to readers that take the first entry they can use.
        family = type(self).__name__.removesuffix("Config")
        self.auto_map = {
            "AutoConfig": f"configuration_regraft.{family}Config",
            "AutoModel": f"modeling_regraft.{family}Model",
            "AutoModelForCausalLM": f"modeling_regraft.{family}ForCausalLM",
        }

    def validate_architecture(self) -> None:
        """Accepts head counts that do not divide the hidden size: ``head_dim`` is explicit in a pruned model."""

    def __getattr__(self, name: str) -> Any:
        # Only reached for what a layer's config has not: see `layer`.
        whole = self.__dict__.get("whole_config")
        if name == "_attn_implementation_internal" and whole is not None:
            return whole._attn_implementation_internal
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def layer(self, index: int) -> PreTrainedConfig:
        """Returns the config of one layer, with ``skip`` always set.

        Its attention implementation stays that of the whole model, also when that is changed later.
        """
        config = copy.copy(self.per_layer_config[index])  # pyright: ignore[reportAttributeAccessIssue]
        config.skip = list(getattr(config, "skip", None) or [])
        config.__dict__.pop("_attn_implementation_internal", None)
        config.__dict__["whole_config"] = self
        return config

    def even(self) -> PreTrainedConfig:
        """Returns a copy without the per-layer sizes: what the stock class can be built from."""
        config = copy.copy(self)
        config.__dict__.pop("_heterogeneity_spec", None)
        return config  # pyright: ignore[reportReturnType]


@strict
class RegraftLlamaConfig(UnevenConfig, LlamaConfig):  # noqa: D101
    model_type = "regraft_llama"


@strict
class RegraftMistralConfig(UnevenConfig, MistralConfig):  # noqa: D101
    model_type = "regraft_mistral"


@strict
class RegraftQwen2Config(UnevenConfig, Qwen2Config):  # noqa: D101
    model_type = "regraft_qwen2"


@strict
class RegraftQwen3Config(UnevenConfig, Qwen3Config):  # noqa: D101
    model_type = "regraft_qwen3"


CONFIGS = (RegraftLlamaConfig, RegraftMistralConfig, RegraftQwen2Config, RegraftQwen3Config)
