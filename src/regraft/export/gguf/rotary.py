"""Metadata of GGUF for rotary embeddings, from the ``rope_parameters`` of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regraft.errors import InputError

FREQUENCIES = "rope_freqs.weight"


def refusal(parameters: Mapping[str, Any], *, divisors: bool) -> str:
    """Returns why an architecture has no form for a rotary embedding; an empty text where it has one.

    Args:
        parameters: Rotary parameters of one kind of layer, as in ``config.rope_parameters``.
        divisors: Whether the architecture reads a divisor for each frequency.
    """
    kind = parameters.get("rope_type", "default")
    if kind in ("default", "linear") or _is_plain_yarn(parameters) or (divisors and _is_fixed(parameters)):
        return ""
    if kind == "yarn":
        return "it knows yarn only with the usual factors (attention_factor, mscale, beta_fast, beta_slow and truncate not set)"
    return f"it knows no rotary scaling of type '{kind}'"


def _is_fixed(parameters: Mapping[str, Any]) -> bool:
    """Returns whether each frequency is divided by a number that does not depend on the text."""
    kind = parameters.get("rope_type")
    return kind in ("yarn", "llama3") or (kind == "longrope" and parameters["long_factor"] == parameters["short_factor"])


def _is_plain_yarn(parameters: Mapping[str, Any]) -> bool:
    """Returns whether yarn has the factors that the runtime takes, which reads no others (checked with xllamacpp 2026.10)."""
    usual = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    same = all(parameters.get(name) in (None, value) for name, value in usual.items())
    return parameters.get("rope_type") == "yarn" and same


def rotary(parameters: Mapping[str, Any], config: Any, head_dim: int) -> tuple[dict[str, Any], Tensor | None]:
    """Returns the keys and, where single frequencies are scaled, their divisors.

    Args:
        parameters: Rotary parameters of one kind of layer, as in ``config.rope_parameters``.
        config: The model's config.
        head_dim: Channels of a head.

    Returns:
        Keys below ``<architecture>.rope.``; and a float32 tensor of one divisor for each pair of rotated channels, or None.

    Raises:
        InputError: The scaling is of a kind that the runtime does not know.
    """
    kind = parameters.get("rope_type", "default")
    share = float(parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)
    keys: dict[str, Any] = {"freq_base": float(parameters["rope_theta"]), "dimension_count": int(head_dim * share)}
    if kind == "default":
        return keys, None
    if kind == "linear":
        return keys | {"scaling.type": "linear", "scaling.factor": float(parameters.get("factor") or 1.0)}, None
    if _is_plain_yarn(parameters):
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        factor = float(parameters.get("factor") or config.max_position_embeddings / original)
        return keys | {"scaling.type": "yarn", "scaling.factor": factor, "scaling.original_context_length": int(original)}, None
    if _is_fixed(parameters):
        one = LlamaConfig(  # the model's own config may have no head count that holds for all layers
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(parameters),
        )
        scaled, attention_factor = ROPE_INIT_FUNCTIONS[kind](one, torch.device("cpu"))
        dimensions = keys["dimension_count"]
        plain = 1.0 / keys["freq_base"] ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
        more = {} if attention_factor == 1.0 else {"scaling.attn_factor": float(attention_factor)}
        return keys | more, plain / scaled.float()
    raise InputError(f"rotary scaling of type '{kind}' has no form in GGUF here (default, linear, yarn, llama3); export with `to=hf`")
