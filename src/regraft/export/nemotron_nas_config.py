"""Config of a language model whose layers have sizes of their own, under the names that readers of nemotron-nas use.

This file travels with the model, so it needs nothing but transformers. Each entry of ``block_configs`` has the parts ``attention`` and
``ffn``, whose values are read as attributes.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class Part(dict):  # type: ignore[type-arg]
    """A JSON object whose values are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(PretrainedConfig):
    """Reads ``config.json``.

    Args:
        block_configs: One for each layer.
        kwargs: All else.
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs or []]
        super().__init__(**kwargs)
