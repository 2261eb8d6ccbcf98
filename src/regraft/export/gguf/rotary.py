"""What GGUF says of rotary embeddings, from the ``rope_parameters`` of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regraft.errors import InputError

FREQUENCIES = "rope_freqs.weight"


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
    factor = float(parameters.get("factor") or 1.0)
    if kind == "linear":
        return keys | {"scaling.type": "linear", "scaling.factor": factor}, None
    if kind == "yarn":
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        keys |= {"scaling.type": "yarn", "scaling.factor": factor, "scaling.original_context_length": int(original)}
        names = {"beta_fast": "scaling.yarn_beta_fast", "beta_slow": "scaling.yarn_beta_slow"}
        return keys | {names[key]: float(parameters[key]) for key in names if parameters.get(key) is not None}, None
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        dimensions = keys["dimension_count"]
        plain = 1.0 / keys["freq_base"] ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
        return keys, plain / scaled.float()
    raise InputError(f"rotary scaling of type '{kind}' has no form in GGUF here (default, linear, yarn, llama3); export with `to=hf`")
