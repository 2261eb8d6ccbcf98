"""Zeroing written for the tests alone, on activations: names of modules and the order of heads are all it knows of a family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel


def random_model(model_type: str, config: dict[str, Any]) -> PreTrainedModel:
    """Returns a model of a family, the same every time, in which no weight, bias or norm is at the value that it begins with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@dataclass(frozen=True)
class Places:
    """Where a family's channels can be silenced.

    Attributes:
        layers: The list of layers.
        attention_out: The projection that reads the heads, side by side, and writes the stream.
        mlp_out: The projection that reads the feed-forward channels and writes the stream.
        norms: Norms of the stream in a layer.
        outer: What else writes the stream or normalises it.
        head_norms: Projections whose outputs are normalised over all heads at once: queries, then keys.
    """

    layers: str
    attention_out: str
    mlp_out: str
    norms: Sequence[str]
    outer: Sequence[str]
    head_norms: Sequence[str] = ()


_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA = Places("model.layers", "self_attn.o_proj", "mlp.down_proj", _NORMS, ("model.embed_tokens", "model.norm"))
_FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OPT = ("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm")
_FALCON = ("transformer.word_embeddings", "transformer.ln_f")

PLACES = {
    "bloom": Places(
        "transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", _NORMS,
        ("transformer.word_embeddings", "transformer.word_embeddings_layernorm", "transformer.ln_f"),
    ),
    "falcon": Places("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", (*_NORMS, "ln_attn", "ln_mlp"), _FALCON),
    "gemma2": Places("model.layers", "self_attn.o_proj", "mlp.down_proj", _FOUR, ("model.embed_tokens", "model.norm")),
    "gemma3": Places("model.layers", "self_attn.o_proj", "mlp.down_proj", _FOUR, ("model.embed_tokens", "model.norm")),
    "gpt2": Places(
        "transformer.h", "attn.c_proj", "mlp.c_proj", ("ln_1", "ln_2"), ("transformer.wte", "transformer.wpe", "transformer.ln_f")
    ),
    "gpt_bigcode": Places(
        "transformer.h", "attn.c_proj", "mlp.c_proj", ("ln_1", "ln_2"), ("transformer.wte", "transformer.wpe", "transformer.ln_f")
    ),
    "gpt_neo": Places(
        "transformer.h", "attn.attention.out_proj", "mlp.c_proj", ("ln_1", "ln_2"),
        ("transformer.wte", "transformer.wpe", "transformer.ln_f"),
    ),
    "gpt_neox": Places(
        "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", _NORMS, ("gpt_neox.embed_in", "gpt_neox.final_layer_norm")
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": Places(
        "model.layers", "self_attn.o_proj", "mlp.down_proj", _FOUR, ("model.embed_tokens", "model.norm"),
        ("self_attn.q_proj", "self_attn.k_proj"),
    ),
    "opt": Places("model.decoder.layers", "self_attn.out_proj", "fc2", ("self_attn_layer_norm", "final_layer_norm"), _OPT),
    "opt-350m": Places(
        "model.decoder.layers", "self_attn.out_proj", "fc2", ("self_attn_layer_norm", "final_layer_norm"),
        ("model.decoder.embed_positions", "model.decoder.project_in"),
    ),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": Places("model.layers", "self_attn.o_proj", "mlp.c_proj", _NORMS, ("model.embed_tokens", "model.norm")),
}  # fmt: skip


def places_of(family: str) -> Places:
    """Returns the places of a family or of a variant of it, such as ``falcon-alibi``."""
    return PLACES.get(family) or PLACES[family.partition("-")[0]]


@dataclass(frozen=True)
class Gone:
    """What is silenced in one model; heads are numbered as key-value heads, query heads by their place in each group.

    Attributes:
        heads: Layer to key-value heads.
        query_heads: Layer to places of query heads within each group.
        ffn: Layer to feed-forward channels.
        residual: Channels of the stream.
        attention: Layers whose attention adds nothing.
        mlp: Layers whose feed-forward network adds nothing.
        layers: Layers that hand on what they are given.
    """

    heads: dict[int, Sequence[int]] = field(default_factory=dict)
    query_heads: dict[int, Sequence[int]] = field(default_factory=dict)
    ffn: dict[int, Sequence[int]] = field(default_factory=dict)
    residual: Sequence[int] = ()
    attention: Sequence[int] = ()
    mlp: Sequence[int] = ()
    layers: Sequence[int] = ()


@contextmanager
def zeroed(model: PreTrainedModel, family: str, gone: Gone, *, groups: int, repeats: int, dim: int) -> Iterator[None]:
    """Silences channels of a model inside the block.

    Args:
        model: The model; its weights are not changed.
        family: The model's family.
        gone: The channels to silence.
        groups: Number of key-value heads.
        repeats: Number of query heads for each key-value head.
        dim: Channels of a head.
    """
    places = places_of(family)
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def silence(module: nn.Module, channels: Iterable[int], *, before: bool) -> None:
        index = torch.tensor(sorted(set(channels)), dtype=torch.long)
        if not len(index):
            return

        def cleared(x: Tensor) -> Tensor:
            return x.index_fill(-1, index, 0.0)

        if before:
            handles.append(module.register_forward_pre_hook(lambda _, args: (cleared(args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output: cleared(output)))

    layers = model.get_submodule(places.layers)
    for number, layer in enumerate(layers):
        if number in gone.layers:
            handles.append(layer.register_forward_hook(lambda _, args, output: (args[0], None) if isinstance(output, tuple) else args[0]))
        out, down = layer.get_submodule(places.attention_out), layer.get_submodule(places.mlp_out)
        keys = set(gone.heads.get(number, ()))
        queries = {g * repeats + j for g in range(groups) for j in range(repeats) if g in keys or j in gone.query_heads.get(number, ())}
        for module, heads, before in (
            (out, queries, True),
            *((layer.get_submodule(name), lost, False) for name, lost in zip(places.head_norms, (queries, keys), strict=False)),
        ):
            silence(module, (head * dim + c for head in heads for c in range(dim)), before=before)
        silence(down, gone.ffn.get(number, ()), before=True)
        for module, layers_gone in ((out, gone.attention), (down, gone.mlp)):
            if number in layers_gone:
                handles.append(module.register_forward_hook(lambda _, args, output: torch.zeros_like(output)))
            silence(module, gone.residual, before=False)
        for name in places.norms:
            if name in layer._modules and layer._modules[name] is not None:
                silence(layer.get_submodule(name), gone.residual, before=False)
    for name in places.outer:
        silence(model.get_submodule(name), gone.residual, before=False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
