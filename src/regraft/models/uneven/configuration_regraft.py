"""Configs of models whose layers differ: per-layer head counts and feed-forward widths, attention or feed-forward removed.

This file travels with every unevenly pruned model, so it needs nothing but transformers. Layers that differ from the rest are
listed under ``per_layer_config``, a sparse mapping from layer index to what is different there::

    {"1": {"intermediate_size": 96}, "2": {"num_attention_heads": 3, "num_key_value_heads": 3}, "27": {"skip": ["attention"]}}

``skip`` takes ``attention`` and ``mlp``: the part and its norms are gone from that layer. Where a family differs from Llama in the names
of its modules or in what follows from what, ``layout`` says so: see :data:`LAYOUT`. Linear layers that are stored as two thin ones are
listed under ``factored``: see ``factored_regraft.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("a model with per-layer sizes needs transformers 5.15 or later; get it with: pip install -U transformers")

# Called with the model type, before the first config of a family is made: where regraft is installed it makes the Auto classes
# know the models here.
BEFORE_FIRST_CONFIG: list[Callable[[str], None]] = []

# What a model chooses for all of its layers, and transformers changes in the model's config alone: how attention and experts are computed.
CHOSEN_FOR_ALL = ("_attn_implementation_internal", "_experts_implementation_internal")

LAYOUT: dict[str, Any] = {
    "layers": "layers",  # name of the list of layers in the base model
    "attention": "self_attn",  # name of the attention in a layer
    "mlp": ["mlp"],  # names of the modules that are a layer's feed-forward network; the last one writes the stream
    "attention_norms": ["input_layernorm"],  # norms that serve the attention alone
    "mlp_norms": ["post_attention_layernorm"],  # norms that serve the feed-forward network alone
    "heads": "num_attention_heads",  # key of the number of query heads
    "head_size": "explicit",  # "derived": the family computes it as hidden size / heads
    "mlp_size": "explicit",  # "derived": the family computes the feed-forward width from the hidden size
    "writers": [],  # matrices that write the residual stream, where sizes are derived; all others read it
    "apart": [],  # modules outside the layers that have nothing to do with the stream's width
    "width_keys": [],  # further keys that hold the hidden size
    "adds_residual": False,  # whether attention and feed-forward network add the residual themselves
}


class UnevenConfig:
    """Per-layer sizes for the config of a family; mixed in before the family's own config class."""

    model_type: str
    _auto_class = "AutoConfig"  # makes `save_pretrained` copy this file into the folder

    def __post_init__(self, **kwargs: Any) -> None:
        for call in BEFORE_FIRST_CONFIG:
            call(self.model_type)
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

    def validate_rope(self) -> None:
        """Checks the rotary embedding as every family does, and not the head size that some compute from the hidden size."""
        PreTrainedConfig.validate_rope(self)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        # Only reached for what a layer's config has not: see `layer`.
        whole = self.__dict__.get("whole_config")
        if name in CHOSEN_FOR_ALL and whole is not None:
            return getattr(whole, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def laid_out(self, key: str) -> Any:
        """Returns what the layout says of one thing."""
        return self.__dict__.get("layout", {}).get(key, LAYOUT[key])

    def layer(self, index: int) -> PreTrainedConfig:
        """Returns the config of one layer, with ``skip`` always set.

        Its implementation of attention and of experts stays that of the whole model, also when that is changed later.
        """
        config: Any = copy.copy(self.per_layer_config[index])  # pyright: ignore[reportAttributeAccessIssue]
        config.skip = list(getattr(config, "skip", None) or [])
        for name in CHOSEN_FOR_ALL:
            config.__dict__.pop(name, None)
        config.__dict__["whole_config"] = self
        return self._narrowed(config)

    def even(self) -> PreTrainedConfig:
        """Returns a copy without the per-layer sizes: what the stock class can be built from."""
        config: Any = copy.copy(self)
        config.__dict__.pop("_heterogeneity_spec", None)
        key, stream = self.laid_out("heads"), config.hidden_size
        # What is as wide as the stream stays so, and what is not must not become so by chance: a family may build a projection
        # in between. The layers are built again, so that one head more does no harm.
        others = {name: getattr(config, name) for name in self.laid_out("width_keys")}
        if self.laid_out("head_size") == "derived":
            if stream % config.head_dim == 0:  # then what is outside the layers computes with the width that it has
                setattr(config, key, stream // config.head_dim)
            while getattr(config, key) * config.head_dim in [size for size in others.values() if size != stream]:
                setattr(config, key, getattr(config, key) + 1)
        narrowed = self._narrowed(config)
        for name, size in others.items():
            if size == stream:
                setattr(narrowed, name, narrowed.hidden_size)
        return narrowed

    def _narrowed(self, config: Any) -> PreTrainedConfig:
        """Makes the hidden size that of all heads together, where the family takes the head size from it.

        What is built so is right but for the width of the stream, which ``modeling_regraft`` then sets.
        """
        if self.laid_out("head_size") == "derived":
            config.hidden_size = getattr(config, self.laid_out("heads")) * config.head_dim
        return config


def config_named(name: str) -> Any:
    """Returns ``Regraft<Family>Config``, made when it is first asked for.

    Raises:
        AttributeError: transformers has no such family.
    """
    base = getattr(transformers, name.removeprefix("Regraft"), None)
    if not (name.startswith("Regraft") and name.endswith("Config") and isinstance(base, type)):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _made(name, base)


def config_class(model_type: str) -> Any:
    """Returns the config class of a family's uneven models, from the family's ``model_type``."""
    return config_named(f"Regraft{CONFIG_MAPPING[model_type].__name__}")


@cache
def _made(name: str, base: type[PreTrainedConfig]) -> Any:
    # A `head_dim` of its own takes the place of one that is computed.
    body = {"__module__": __name__, "__qualname__": name, "model_type": f"regraft_{base.model_type}", "head_dim": None}
    return strict(type(name, (UnevenConfig, base), body))


__getattr__ = config_named
