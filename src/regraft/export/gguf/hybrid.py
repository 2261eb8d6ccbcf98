"""GGUF architectures of decoders with attention in some layers alone: LFM2 has short convolutions in the others, Granite 4 has Mamba 2.

Which layers have attention the runtimes read from the list of key-value heads, in which the others have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from regraft.export.gguf.llama_like import ATTENTION, QUERIES_KEYS_VALUES, TWO_NORMS, multipliers, norm, outside, stored_parts
from regraft.export.gguf.rotary import rotary
from regraft.export.gguf.source import Entry, Layout, Metadata, Source
from regraft.models.view import LayerSizes

LFM2_NORMS = {"operator_norm": "attn_norm", "ffn_norm": "ffn_norm"}
LFM2_HEAD_NORMS = {"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"}
LFM2 = {
    **QUERIES_KEYS_VALUES,
    "self_attn.out_proj": "attn_output",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
GRANITE = {
    **ATTENTION,
    "mamba.in_proj": "ssm_in",
    "mamba.out_proj": "ssm_out",
    "shared_mlp.output_linear": "ffn_down",
}


def with_attention(source: Source) -> list[LayerSizes]:
    """Returns the sizes of the layers that have attention by their kind."""
    return [size for size in source.sizes if "attention" not in size.absent]


def refusal(source: Source) -> str:
    """Returns why the runtime cannot hold the layers of a hybrid; an empty text where it can."""
    attention = with_attention(source)
    if not attention or len(attention) == len(source.sizes):
        return "it needs layers with and without attention"
    if any(size.removed for size in source.sizes):
        return "it takes no layer that lost its attention or feed-forward network"
    if len({(size.query_heads, size.kv_heads) for size in attention}) > 1 or len({size.ffn for size in source.sizes}) > 1:
        return "its attention must have the same heads everywhere and its networks one width: prune with `shape=uniform`"
    return ""


def lfm2_refusal(source: Source) -> str:
    """Returns why LFM2's architecture cannot hold a model."""
    if source.config.conv_bias:
        return "it has no biases in convolutions"
    narrow = any(size.query_heads * size.head_dim != source.width for size in with_attention(source))
    return refusal(source) or ("its heads together must be as wide as the stream: prune with `targets=ffn`" if narrow else "")


def granite_refusal(source: Source) -> str:
    """Returns why Granite 4's architecture cannot hold a model."""
    config = source.config
    if config.num_local_experts:
        return "experts beside the shared network are not written here"
    if config.attention_bias or config.mamba_proj_bias:
        return "it has no biases in its projections"
    limits = tuple(config.time_step_limit or (0.0, math.inf))
    if limits[0] > 0 or limits[1] < math.inf:
        return "it has no limits on the time steps of Mamba"
    return refusal(source)


def lfm2(source: Source) -> Layout:
    """Returns the file of an LFM2."""
    metadata = _common(source, float(source.config.norm_eps)) | {"shortconv.l_cache": int(source.config.conv_L_cache)}

    def layer(index: int) -> list[Entry]:
        prefix = f"{source.family.layers}.{index}"
        entries = stored_parts(source, index, {**LFM2_NORMS, **LFM2_HEAD_NORMS}, LFM2)
        return [*entries, *_kernel(source, f"{prefix}.conv.conv", f"blk.{index}.shortconv.conv", index)]

    return _file("lfm2", source, metadata, "token_embd_norm", layer)


def granite(source: Source) -> Layout:
    """Returns the file of a Granite 4 without experts, whose feed-forward network is the one that experts would share."""
    config = source.config
    inner = int(config.mamba_expand) * int(config.hidden_size)
    metadata = _common(source, float(config.rms_norm_eps)) | {
        "ssm.conv_kernel": int(config.mamba_d_conv),
        "ssm.inner_size": inner,
        "ssm.state_size": int(config.mamba_d_state),
        "ssm.time_step_rank": int(config.mamba_n_heads),
        "ssm.group_count": int(config.mamba_n_groups),
        **multipliers(source)[0],
        "rope.scaling.finetuned": config.position_embedding_type == "rope",  # by this key the runtime knows whether there is a rotation
    }
    groups = int(config.mamba_n_groups)

    def layer(index: int) -> list[Entry]:
        prefix, stem = f"{source.family.layers}.{index}", f"blk.{index}"
        entries = stored_parts(source, index, TWO_NORMS, GRANITE, paired_heads=True)
        entries += _halves(source, index)
        if f"{prefix}.mamba.A_log" not in source.shapes:
            return entries
        heads = source.shapes[f"{prefix}.mamba.A_log"][0]
        own: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {
            "ssm_a": ((heads, 1), lambda: -source.tensor(f"{prefix}.mamba.A_log").float().exp().reshape(heads, 1)),
            "ssm_d": ((heads, 1), lambda: source.tensor(f"{prefix}.mamba.D").reshape(heads, 1)),
            "ssm_dt.bias": ((heads,), lambda: source.tensor(f"{prefix}.mamba.dt_bias")),
            "ssm_norm.weight": ((groups, inner // groups), lambda: source.tensor(f"{prefix}.mamba.norm.weight").reshape(groups, -1)),
        }
        entries += _kernel(source, f"{prefix}.mamba.conv1d", f"{stem}.ssm_conv1d", index)
        return [*entries, *(Entry(f"{stem}.{name}", shape, make, exact=True, layer=index) for name, (shape, make) in own.items())]

    return _file("granitehybrid", source, metadata, "output_norm", layer)


def _common(source: Source, epsilon: float) -> Metadata:
    attention, parameters = with_attention(source)[0], source.config.rope_parameters
    rope, _ = rotary(parameters, source.config, source.head_dim)
    return {
        "vocab_size": source.vocabulary,
        "context_length": int(source.config.max_position_embeddings),
        "embedding_length": source.width,
        "block_count": len(source.sizes),
        "feed_forward_length": source.sizes[0].ffn,
        "attention.head_count": attention.query_heads,
        "attention.head_count_kv": [size.kv_heads for size in source.sizes],
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        "attention.layer_norm_rms_epsilon": epsilon,
        **{f"rope.{key}": value for key, value in rope.items()},
    }


def _file(name: str, source: Source, metadata: Metadata, last_norm: str, layer: Callable[[int], list[Entry]]) -> Layout:
    entries = [outside(source, source.family.embedding, "token_embd")]
    for index in range(len(source.sizes)):
        entries += layer(index)
    entries.append(norm(source, source.family.final_norm, last_norm))
    if not source.tied:
        entries.append(outside(source, source.family.head, "output"))
    return Layout(name, metadata, tuple(entries), int(metadata["context_length"]))


def _kernel(source: Source, module: str, stem: str, layer: int) -> list[Entry]:
    """Returns the kernel (channels, taps) of a convolution of each channel alone, with its bias; nothing where a layer has none."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    if weight not in source.shapes:
        return []
    channels, _, taps = source.shapes[weight]
    found = [Entry(f"{stem}.weight", (channels, taps), lambda: source.tensor(weight).squeeze(1), exact=True, layer=layer)]
    if bias in source.shapes:
        found.append(Entry(f"{stem}.bias", (channels,), lambda: source.tensor(bias), exact=True, layer=layer))
    return found


def _halves(source: Source, index: int) -> list[Entry]:
    """Returns gate and values of a feed-forward network that are one matrix in the model, the gate first."""
    module = f"{source.family.layers}.{index}.shared_mlp.input_linear"
    twice, width = source.shapes[f"{module}.weight"]

    def half(number: int) -> Callable[[], Tensor]:
        return lambda: source.tensor(f"{module}.weight").chunk(2)[number].contiguous()

    names: Any = enumerate(("ffn_gate", "ffn_up"))
    return [Entry(f"blk.{index}.{stem}.weight", (twice // 2, width), half(n), reads=module, layer=index) for n, stem in names]
