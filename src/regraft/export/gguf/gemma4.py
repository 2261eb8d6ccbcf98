"""GGUF architecture of Gemma 4's language models: heads of two sizes, shared keys and values, and an embedding that feeds every layer.

The feed-forward width is read for each layer, so that layers may differ in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from regraft.export.gguf.llama_like import FOUR_NORMS, HEAD_NORMS, PROJECTIONS, made, norm, outside, stored_parts
from regraft.export.gguf.rotary import FREQUENCIES
from regraft.export.gguf.source import Entry, Layout, Metadata, Source
from regraft.models.gguf_config import NO_CAP

WINDOW, WHOLE = "sliding_attention", "full_attention"
NORMS = {**FOUR_NORMS, **HEAD_NORMS, "post_per_layer_input_norm": "post_norm"}
MATRICES = {**PROJECTIONS, "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj"}
NEVER_TURNED = 1e30  # divisor of a frequency for channels that are not rotated


def refusal(source: Source) -> str:
    """Returns why the runtime cannot hold a Gemma 4; an empty text where it can."""
    config, kinds = source.config, list(source.config.layer_types)
    if config.enable_moe_block:
        return "experts beside the feed-forward network are not written here"
    if config.use_bidirectional_attention == "all":
        return "it looks back only, the model both ways"
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"it computes gelu, the model {config.hidden_activation}"
    if any(name.endswith("_proj.bias") for name in source.shapes):
        return "it has no biases in attention and feed-forward network"
    if {WINDOW, WHOLE} != set(kinds):
        return "it needs layers with and without a sliding window"
    if any(size.removed for size in source.sizes):
        return "it takes no layer that lost its attention or feed-forward network"
    table = source.shapes.get("model.embed_tokens_per_layer.weight")
    if table is not None and table[0] != source.vocabulary:
        return "its two embeddings must have the same tokens"
    local, whole = (config.rope_parameters[kind]["rope_type"] for kind in (WINDOW, WHOLE))
    if local != "default" or whole not in ("default", "proportional"):
        return f"it knows no rotary scaling of type '{whole if local == 'default' else local}'"
    first = len(kinds) - int(config.num_kv_shared_layers)
    if first < len(kinds) and kinds[first - 2 : first] != [WINDOW, WHOLE]:
        return "layers can share the keys and values of the last two that have their own only, with and without a window in this order"
    return ""


def gemma4(source: Source) -> Layout:
    """Returns the file of a Gemma 4."""
    config, layers = source.config, range(len(source.sizes))
    kinds = list(config.layer_types)
    head_dims = {kind: _head_dim(source, kinds.index(kind)) for kind in (WINDOW, WHOLE)}
    queries = [source.shapes[f"{_layer(source, index)}.self_attn.q_proj.weight"][0] // head_dims[kinds[index]] for index in layers]
    widths = [source.shapes[f"{_layer(source, index)}.mlp.down_proj.weight"][1] for index in layers]
    gate = f"{_layer(source, 0)}.per_layer_input_gate.weight"
    metadata: Metadata = {
        "vocab_size": source.vocabulary,
        "context_length": int(config.max_position_embeddings),
        "embedding_length": source.width,
        "embedding_length_per_layer_input": source.shapes[gate][0] if gate in source.shapes else 0,
        "block_count": len(kinds),
        "feed_forward_length": widths,
        "attention.head_count": queries,
        "attention.head_count_kv": _kv_heads(source, kinds, head_dims),
        "attention.key_length": head_dims[WHOLE],
        "attention.value_length": head_dims[WHOLE],
        "attention.key_length_swa": head_dims[WINDOW],
        "attention.value_length_swa": head_dims[WINDOW],
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": [kind == WINDOW for kind in kinds],
        "attention.shared_kv_layers": int(config.num_kv_shared_layers),
        "rope.freq_base": float(config.rope_parameters[WHOLE]["rope_theta"]),
        "rope.freq_base_swa": float(config.rope_parameters[WINDOW]["rope_theta"]),
        "rope.dimension_count": head_dims[WHOLE],
        "rope.dimension_count_swa": head_dims[WINDOW],
        "final_logit_softcapping": float(config.final_logit_softcapping or NO_CAP),  # without the key the runtime caps at 30
    }
    divisors = _divisors(config, head_dims[WHOLE])
    entries = [
        outside(source, source.family.embedding, "token_embd"),
        Entry(FREQUENCIES, tuple(divisors.shape), lambda: divisors, exact=True),
        *_of_all_layers(source),
    ]
    for index in layers:
        entries += _of_layer(source, index)
    entries.append(norm(source, source.family.final_norm, "output_norm"))
    if not source.tied:
        entries.append(outside(source, source.family.head, "output"))
    return Layout("gemma4", metadata, tuple(entries), int(metadata["context_length"]))


def _layer(source: Source, index: int) -> str:
    return f"{source.family.layers}.{index}"


def _head_dim(source: Source, index: int) -> int:
    return source.shapes[f"{_layer(source, index)}.self_attn.q_norm.weight"][0]


def _kv_heads(source: Source, kinds: list[str], head_dims: dict[str, int]) -> list[int]:
    """Returns the key-value heads of each layer; a layer that has none of its own uses those of the last of its kind."""
    found, last = list[int](), dict[str, int]()
    for index, kind in enumerate(kinds):
        rows = source.shapes.get(f"{_layer(source, index)}.self_attn.k_proj.weight")
        if rows is not None:
            last[kind] = rows[0] // head_dims[kind]
        found.append(last[kind])
    return found


def _divisors(config: Any, head_dim: int) -> Tensor:
    """Returns what the frequencies of layers without a window are divided by, (head_dim / 2,), float32."""
    parameters = config.rope_parameters[WHOLE]
    plain = 1.0 / float(parameters["rope_theta"]) ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if parameters["rope_type"] == "default":
        return torch.ones_like(plain)
    kind = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    own, _ = kind(config.per_layer_config[WHOLE], torch.device("cpu"), layer_type=WHOLE)
    return torch.where(own > 0, plain / own, NEVER_TURNED)


def _of_all_layers(source: Source) -> list[Entry]:
    """Returns the second embedding, which holds a part for each layer, and its projection; nothing where a model has none."""
    if "model.embed_tokens_per_layer.weight" not in source.shapes:
        return []
    found = [
        Entry(f"{stem}.weight", source.shapes[f"{module}.weight"], made(source, f"{module}.weight", 0, 1.0))
        for module, stem in {
            "model.embed_tokens_per_layer": "per_layer_token_embd",
            "model.per_layer_model_projection": "per_layer_model_proj",
        }.items()
    ]
    return [*found, norm(source, "model.per_layer_projection_norm", "per_layer_proj_norm")]


def _of_layer(source: Source, index: int) -> list[Entry]:
    entries = stored_parts(source, index, NORMS, MATRICES)
    scalar = f"{_layer(source, index)}.layer_scalar"
    make, name = made(source, scalar, 0, 1.0), f"blk.{index}.layer_output_scale.weight"
    entries.append(Entry(name, source.shapes[scalar], make, exact=True, layer=index))
    return entries
