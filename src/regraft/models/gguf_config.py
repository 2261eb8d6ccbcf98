"""Config of a model from a GGUF file, beyond what transformers' reader takes over: scaled rotations, caps, scales, sizes of GPT-2.

The reader leaves these at the defaults of the config's class, and the model computes something else without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regraft.errors import ModelError, shown
from regraft.models.gguf_header import GgufHeader

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
NO_CAP = 1e6  # a cap so far beyond every logit stands for none
# Llama 3's scaling as all its models have it; the file holds its result only.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# By architecture, the number of layers of the one size whose attention llama.cpp scales by the width of the stream.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def complete_config(config: Any, header: GgufHeader, path: Path) -> None:
    """Gives a config what the file says and transformers' reader leaves out.

    Args:
        config: The config that the reader made; it is changed.
        header: What the file says.
        path: The file.

    Raises:
        ModelError: The file has a scaling of the rotation that is not known here, or lacks a number that llama.cpp asks for.
    """
    said = _Said(header)
    _check_numbers(said)
    rows = header.tensors["token_embd.weight"].shape[0]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # defaults of the class may lie beyond a small vocabulary
        number = getattr(config, name, None)
        if isinstance(number, int) and number >= rows:
            setattr(config, name, None)
    if header.architecture == "gpt2":
        config.n_inner, config.n_positions = int(said["feed_forward_length"]), int(said["context_length"])
        return
    head_dim = said.get("attention.key_length")
    if head_dim and "head_dim" in config.to_dict():  # for some families the reader leaves it at the class's default
        config.head_dim = int(head_dim)
    if header.architecture in SCALED_BY_WIDTH:
        _gemma(config, header.architecture, said)
    parameters: Any = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict):
        whole = "full_attention" in parameters
        scaled = parameters["full_attention"] if whole else dict(parameters)
        scaled |= _rotation(config, scaled, header, said, path)
        if not whole:
            config.rope_parameters = scaled


class _Said:
    """The keys of a file below the name of its architecture."""

    def __init__(self, header: GgufHeader) -> None:
        self._metadata, self._prefix = header.metadata, f"{header.architecture}."

    def get(self, key: str) -> Any:
        return self._metadata.get(self._prefix + key)

    def __getitem__(self, key: str) -> Any:
        found = self.get(key)
        if found is None:
            raise ModelError(f"the file lacks '{self._prefix}{key}'; convert it again")
        return found

    def number(self, key: str, least: float, most: float) -> None:
        """Refuses a number that is missing, no number, or out of range; NaN is in no range."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ModelError(
                f"'{self._prefix}{key}' is {shown(value, 40)}, and should be from {least:g} to {most:g}; convert the file again"
            )


def _check_numbers(said: _Said) -> None:
    """Refuses numbers without which, or with which, the model would compute something else than in llama.cpp.

    Raises:
        ModelError: One is missing, of another type, or out of range.
    """
    epsilons = [name for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon") if said.get(name) is not None]
    said.number("context_length", 1, 2**31 - 1)
    said.number(epsilons[0] if epsilons else "attention.layer_norm_rms_epsilon", 0.0, 1.0)
    for name in ("rope.freq_base", "rope.freq_base_swa"):
        if said.get(name) is not None:
            said.number(name, 1e-3, 1e12)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if said.get(name) is not None:
            said.number(name, 1, 2**20)
    keys, values = said.get("attention.key_length"), said.get("attention.value_length")
    if keys is not None and values not in (None, keys):
        raise ModelError("its values have heads of another size than its keys, which is not read; give the Hugging Face folder")


def _gemma(config: Any, architecture: str, said: _Said) -> None:
    by_width = config.num_hidden_layers == SCALED_BY_WIDTH[architecture]
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if by_width else config.head_dim
    if said.get("attention.sliding_window"):
        config.sliding_window = int(said["attention.sliding_window"])
    if architecture == "gemma2":
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            cap = said.get(name)
            if cap is not None:
                setattr(config, name, float(cap) if cap < NO_CAP else None)
    local = said.get("rope.freq_base_swa")
    if local is not None:
        config.rope_parameters["sliding_attention"]["rope_theta"] = float(local)


def _rotation(config: Any, before: Mapping[str, Any], header: GgufHeader, said: _Said, path: Path) -> dict[str, Any]:
    """Returns the rotary parameters that differ from those of the reader."""
    found: dict[str, Any] = {}
    dimensions = said.get("rope.dimension_count")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if dimensions and int(dimensions) > head_dim:
        raise ModelError(f"it rotates {dimensions} channels of heads that have {head_dim}; convert the file again")
    if dimensions and int(dimensions) < head_dim:
        found["partial_rotary_factor"] = int(dimensions) / head_dim
    factor = said.get("rope.scaling.attn_factor")
    attention = {} if factor is None else {"attention_factor": float(factor)}
    if LONG in header.tensors:
        factors = {"long_factor": _values(header, LONG, path).tolist(), "short_factor": _values(header, SHORT, path).tolist()}
        original = int(said["rope.scaling.original_context_length"])
        if "original_max_position_embeddings" in config.to_dict():
            config.original_max_position_embeddings = original
        return {**found, "rope_type": "longrope", **factors, **attention, "original_max_position_embeddings": original}
    if FREQUENCIES in header.tensors:
        divisors = _values(header, FREQUENCIES, path)
        return found | _divided(divisors, float(before["rope_theta"]), attention, config)
    kind = said.get("rope.scaling.type")
    if kind in (None, "none"):
        return found
    scaling = {"rope_type": kind, "factor": float(said["rope.scaling.factor"])}
    if kind == "linear":
        return found | scaling
    if kind == "yarn" and factor in (None, 1.0):
        return {**found, **scaling, "original_max_position_embeddings": int(said["rope.scaling.original_context_length"])}
    raise ModelError(f"its rotary scaling of type '{kind}' is not read (linear, yarn without attn_factor, and factors by frequency are)")


def _divided(divisors: Tensor, theta: float, attention: Mapping[str, float], config: Any) -> dict[str, Any]:
    """Returns parameters under which the frequencies are divided so: Llama 3's where these do it, else a list."""
    llama3 = {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max()), **LLAMA3}
    if not attention and divisors.max() > 1:
        head_dim = 2 * len(divisors)
        made = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=dict(llama3))
        plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if torch.allclose(plain / divisors, ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))[0], rtol=1e-4):
            return llama3
    factors = divisors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "attention_factor": 1.0,
        **attention,
        "original_max_position_embeddings": int(config.max_position_embeddings),
    }


def _values(header: GgufHeader, name: str, path: Path) -> Tensor:
    """Returns a float32 tensor of the file."""
    tensor = header.tensors.get(name)
    if tensor is None or tensor.kind != "F32":
        raise ModelError(f"'{name}' is missing or not in F32; convert the file again")
    return torch.from_numpy(np.fromfile(path, dtype="<f4", count=tensor.size // 4, offset=tensor.start))
