"""GGUF architectures of decoders with rotary embeddings, which differ in names, norms and factors: Llama, Qwen, Gemma, OLMo, Granite.

``deci`` is the architecture that llama.cpp has for NVIDIA's Nemotron models; it takes the head counts and the feed-forward width of
every layer from lists, and computes a Llama. ``openelm`` (Apple's) does the same for Qwen 3 with tied embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.export.gguf.rotary import FREQUENCIES, rotary
from regraft.export.gguf.source import Entry, Layout, Metadata, Source
from regraft.models.gguf_config import NO_CAP, SCALED_BY_WIDTH

QUERIES_KEYS_VALUES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
ATTENTION = {**QUERIES_KEYS_VALUES, "self_attn.o_proj": "attn_output"}
PROJECTIONS = {
    **ATTENTION,
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GLM4_NORMS = {
    "input_layernorm": "attn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
ZERO_WIDTH = 32  # channels of a feed-forward network that stands for none: one block of the usual quantisations


@dataclass(frozen=True)
class Gated:
    """One architecture of decoders with gated feed-forward networks.

    Attributes:
        name: Name of the architecture in the runtime.
        norms: Names of the tensors, by name of the norm inside a layer.
        permuted: Whether the rotation takes neighbouring channels as pairs, so that rows of queries and keys change places.
        per_layer: Whether head counts and widths may differ from layer to layer.
        window: Whether it knows a sliding window.
        fused: Whether queries, keys and values are one matrix.
        extra: Further keys of a model, and a factor on its queries.
        projections: Names of the matrices, by name of the module inside a layer.
        head_norms: Names of the norms of queries and keys, by name of the module.
        epsilon: Name of the norms' epsilon in the config, which says whether they are root-mean-square norms.
    """

    name: str
    norms: Mapping[str, str]
    permuted: bool = False
    per_layer: bool = False
    window: bool = False
    fused: bool = False
    extra: Callable[[Source], tuple[Metadata, float]] = lambda source: ({}, 1.0)
    projections: Mapping[str, str] = field(default_factory=lambda: PROJECTIONS)
    head_norms: Mapping[str, str] = field(default_factory=lambda: HEAD_NORMS)
    epsilon: str = "rms_norm_eps"


def paired(tensor: Tensor, heads: int) -> Tensor:
    """Returns a projection's rows in the order in which neighbours are rotated together.

    transformers rotates channel i of a head with channel i + d/2 (d channels a head), llama.cpp's Llama channel 2i with 2i + 1.

    Args:
        tensor: Weight (heads · d, in) or bias (heads · d,).
        heads: Number of heads.
    """
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def lay_out(kind: Gated, source: Source) -> Layout:
    """Returns the file of a model in one of these architectures.

    Raises:
        InputError: Its rotary embedding has no form in GGUF.
    """
    config, notes = source.config, list[str]()
    keys, scale = kind.extra(source)
    parameters: Any = config.rope_parameters
    rope, frequencies = rotary(parameters.get("full_attention", parameters), config, source.head_dim)
    context = int(config.max_position_embeddings)
    window = _window(config)
    if not kind.window and window is not None and window < context:
        context = window
        notes.append(
            f"the file promises a context of {window} tokens, the model's sliding window, as '{kind.name}' in llama.cpp has no window"
        )
    metadata: Metadata = {
        "vocab_size": source.vocabulary,
        "context_length": context,
        "embedding_length": source.width,
        "block_count": len(source.sizes),
        **_sizes(kind, source),
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        f"attention.layer_norm_{'rms_' if 'rms' in kind.epsilon else ''}epsilon": float(getattr(config, kind.epsilon)),
        **{f"rope.{key}": value for key, value in rope.items()},
        **keys,
    }
    entries = [outside(source, source.family.embedding, "token_embd")]
    if frequencies is not None:
        entries.append(Entry(FREQUENCIES, tuple(frequencies.shape), lambda: frequencies, exact=True))
    for index in range(len(source.sizes)):
        entries += _layer(kind, source, index, scale)
    entries.append(norm(source, source.family.final_norm, "output_norm"))
    if not source.tied or kind.name == "step35":  # which has no form without it
        entries.append(outside(source, source.family.embedding if source.tied else source.family.head, "output"))
    return Layout(kind.name, metadata, tuple(entries), context, tuple(notes))


def _window(config: Any) -> int | None:
    values = config.to_dict()
    kinds, window = values.get("layer_types"), values.get("sliding_window")
    return int(window) if window and (kinds is None or "sliding_attention" in kinds) else None


def _sizes(kind: Gated, source: Source) -> Metadata:
    """Returns head counts and widths: of the model where all layers are alike, else of each layer."""
    shown = [_shown(source, index) for index in range(len(source.sizes))]
    names = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    found: Metadata = {}
    for name, column in zip(names, zip(*shown, strict=True), strict=True):
        found[name] = list(column) if kind.per_layer else column[0]
    return found


def _shown(source: Source, index: int) -> tuple[int, int, int]:
    """Returns query heads, key-value heads and width of a layer as the file has them; what is empty may need zeros in its place.

    llama.cpp drops the attention of a layer without feed-forward network, and asks for attention in layer 0.
    """
    size = source.sizes[index]
    ffn = ZERO_WIDTH if size.query_heads and not size.ffn else size.ffn
    if index == 0 and not size.query_heads:
        return 1, 1, ffn or ZERO_WIDTH
    return size.query_heads, size.kv_heads, ffn


def _layer(kind: Gated, source: Source, index: int, scale: float) -> list[Entry]:
    query_heads, kv_heads, ffn = _shown(source, index)
    size, head_dim, width = source.sizes[index], source.head_dim, source.width
    shapes = {
        "attn_q": (query_heads * head_dim, width),
        "attn_k": (kv_heads * head_dim, width),
        "attn_v": (kv_heads * head_dim, width),
        "attn_output": (width, query_heads * head_dim),
        "ffn_gate": (ffn, width),
        "ffn_up": (ffn, width),
        "ffn_down": (width, ffn),
    }
    present = {"attn": query_heads > 0, "ffn": ffn > 0}
    entries: list[Entry] = []
    for module, stem in {**kind.norms, **kind.head_norms}.items():
        name = f"{source.family.layers}.{index}.{module}"
        if f"{name}.weight" in source.shapes:
            factor = scale if module == "self_attn.q_norm" else 1.0
            entries.append(norm(source, name, f"blk.{index}.{stem}", index, factor))
        elif module not in kind.head_norms and present["attn" if "attn" in stem or "attention" in stem else "ffn"]:
            entries.append(Entry(f"blk.{index}.{stem}.weight", (width,), lambda: torch.ones(width), exact=True, layer=index))
    in_norm = any(f"{source.family.layers}.{index}.{module}.weight" in source.shapes for module in kind.head_norms)
    for module, stem in kind.projections.items():
        if not present[stem.partition("_")[0]]:
            continue
        name = f"{source.family.layers}.{index}.{module}"
        heads = {"attn_q": size.query_heads, "attn_k": size.kv_heads}.get(stem, 0) if kind.permuted else 0
        factor = scale if stem == "attn_q" and not in_norm else 1.0
        if f"{name}.weight" not in source.shapes:
            shape = shapes[stem]
            entries.append(Entry(f"blk.{index}.{stem}.weight", shape, lambda shape=shape: torch.zeros(shape), layer=index))
            continue
        for part, exact in (("weight", False), ("bias", True)):
            if f"{name}.{part}" in source.shapes:
                shape = source.shapes[f"{name}.{part}"]
                make, pieces = made(source, f"{name}.{part}", heads, factor), blocks(source, f"{name}.{part}", heads, factor)
                entries.append(Entry(f"blk.{index}.{stem}.{part}", shape, make, exact, "" if exact else name, index, pieces))
    return _fuse(entries, index) if kind.fused else entries


def made(source: Source, name: str, heads: int, factor: float) -> Callable[[], Tensor]:
    """Returns what computes a tensor: with rows :func:`paired` where heads are given, and multiplied by a factor."""

    def make() -> Tensor:
        tensor = source.tensor(name)
        tensor = paired(tensor, heads) if heads else tensor
        return tensor if factor == 1.0 else tensor.double() * factor

    return make


def blocks(source: Source, name: str, heads: int, factor: float) -> Callable[[], Iterable[Tensor]] | None:
    """Returns what computes a matrix as :func:`made`, in blocks of rows; None for a vector."""
    shape = source.shapes[name]
    if len(shape) == 1:
        return None
    head = shape[0] // heads if heads else 1

    def make() -> Iterable[Tensor]:
        for piece in source.pieces(name, head):
            turned = paired(piece, piece.shape[0] // head) if heads else piece
            yield turned if factor == 1.0 else turned.double() * factor

    return make


def _fuse(entries: list[Entry], index: int) -> list[Entry]:
    """Puts queries, keys and values of a layer on top of one another."""
    names = [f"blk.{index}.{stem}.weight" for stem in ("attn_q", "attn_k", "attn_v")]
    parts = [next(entry for entry in entries if entry.name == name) for name in names]
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    whole = Entry(f"blk.{index}.attn_qkv.weight", shape, lambda: torch.cat([p.make() for p in parts]), reads=parts[0].reads, layer=index)
    return [whole, *(entry for entry in entries if entry.name not in names)]


def outside(source: Source, module: str, stem: str) -> Entry:
    """Returns the entry of the token embedding or the output projection."""
    name = f"{module}.weight"
    reads = source.family.head if stem == "output" else ""
    return Entry(
        f"{stem}.weight", (source.vocabulary, source.width), lambda: source.tensor(name), reads=reads, pieces=lambda: source.pieces(name, 1)
    )


def norm(source: Source, module: str, stem: str, layer: int = -1, factor: float = 1.0) -> Entry:
    """Returns the entry of a norm whose weight multiplies as it is: families that add one to it have that added."""
    name = f"{module}.weight"
    shape = source.shapes[name]

    def make() -> Tensor:
        return (source.tensor(name).float() + source.family.norm_offset) * factor

    return Entry(f"{stem}.weight", shape, make, exact=True, layer=layer)


def stored_parts(
    source: Source, index: int, norms: Mapping[str, str], projections: Mapping[str, str], *, paired_heads: bool = False
) -> list[Entry]:
    """Returns norms and projections of a layer, of those that it has, under their names in the file."""
    prefix = f"{source.family.layers}.{index}"
    heads: dict[str, int] = {}
    if paired_heads:
        heads = {"attn_q": source.sizes[index].query_heads, "attn_k": source.sizes[index].kv_heads}
    entries = [
        norm(source, f"{prefix}.{module}", f"blk.{index}.{stem}", index)
        for module, stem in norms.items()
        if f"{prefix}.{module}.weight" in source.shapes
    ]
    for module, stem in projections.items():
        name = f"{prefix}.{module}.weight"
        if name in source.shapes:
            ways = (made(source, name, heads.get(stem, 0), 1.0), blocks(source, name, heads.get(stem, 0), 1.0))
            place = f"blk.{index}.{stem}.weight"
            entries.append(Entry(place, source.shapes[name], ways[0], reads=f"{prefix}.{module}", layer=index, pieces=ways[1]))
    return entries


def gemma2(source: Source) -> tuple[Metadata, float]:
    """Returns the keys of Gemma 2: its windows, its caps, and the factor that its own scale of attention puts on queries."""
    config = source.config
    keys: Metadata = {"attention.sliding_window": int(config.sliding_window)}
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping, "final_logit_softcapping": config.final_logit_softcapping}
    # The runtime always caps; a cap far beyond every logit changes none.
    return keys | {name: float(cap or NO_CAP) for name, cap in caps.items()}, _own_scale(source)


def gemma3(source: Source) -> tuple[Metadata, float]:
    """Returns the keys of Gemma 3: its windows, the rotation within them, and the factor on queries."""
    config = source.config
    local: Any = config.rope_parameters["sliding_attention"]
    keys: Metadata = {"attention.sliding_window": int(config.sliding_window), "rope.freq_base_swa": float(local["rope_theta"])}
    return keys, _own_scale(source)


def multipliers(source: Source) -> tuple[Metadata, float]:
    """Returns the keys of Granite's factors on embeddings, residuals, logits and attention."""
    config = source.config
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
        "attention.scale": float(config.attention_multiplier),
    }, 1.0


def cohere2(source: Source) -> tuple[Metadata, float]:
    """Returns the keys of Cohere 2: its windows, and the factor on logits."""
    return {"attention.sliding_window": int(source.config.sliding_window), "logit_scale": float(source.config.logit_scale)}, 1.0


def olmo(source: Source) -> tuple[Metadata, float]:
    """Returns the key of OLMo 3's windows; OLMo 2 has none."""
    window = _window(source.config)
    return ({} if window is None else {"attention.sliding_window": window}), 1.0


def step35(source: Source) -> tuple[Metadata, float]:
    """Returns the keys that make a plain decoder with norms on heads of Step 3.5: windows as long as the context, all channels rotated.

    This architecture rotates half of ``dimension_count`` channels in layers without window, and all of ``dimension_count_swa`` in others.
    """
    layers, context = len(source.sizes), int(source.config.max_position_embeddings)
    base = float(source.config.rope_parameters["rope_theta"])
    return {
        "feed_forward_length": source.sizes[0].ffn,
        "expert_feed_forward_length": source.sizes[0].ffn,  # asked for, although no layer has experts
        "rope.dimension_count": 2 * source.head_dim,
        "rope.dimension_count_swa": source.head_dim,
        "rope.freq_base_swa": base,
        "attention.sliding_window": context,
        "attention.sliding_window_pattern": [index > 0 or layers == 1 for index in range(layers)],
    }, 1.0


def _own_scale(source: Source) -> float:
    """Returns what queries are multiplied with so that the runtime's scale of attention becomes the model's.

    The runtime takes 1/sqrt(head size), but for the largest size of each family, which it knows by its number of layers.
    """
    by_width = len(source.sizes) == SCALED_BY_WIDTH.get(source.kind.removesuffix("_text"))
    theirs = source.width / source.sizes[0].query_heads if by_width else source.head_dim
    return (theirs / float(source.config.query_pre_attn_scalar)) ** 0.5
