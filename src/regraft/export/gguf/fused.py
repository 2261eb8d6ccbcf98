"""GGUF architectures of decoders that keep queries, keys and values in one matrix: Phi-3 and GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.export.gguf.llama_like import norm, outside
from regraft.export.gguf.rotary import rotary
from regraft.export.gguf.source import Entry, Layout, Metadata, Source


def phi3(source: Source) -> Layout:
    """Returns the file of a Phi-3.

    Raises:
        InputError: Its rotary embedding has no form in GGUF.
    """
    config, size, stated = source.config, source.sizes[0], source.config.to_dict()
    parameters: Any = dict(config.rope_parameters)
    tables: list[Entry] = []
    original = int(parameters.get("original_max_position_embeddings") or stated.get("original_max_position_embeddings") or 0)
    extra: Metadata = {}
    if parameters.get("rope_type") == "longrope":
        for name in ("long", "short"):
            values = torch.tensor(parameters[f"{name}_factor"], dtype=torch.float32)
            tables.append(Entry(f"rope_factors_{name}.weight", tuple(values.shape), lambda values=values: values, exact=True))
        ratio = float(parameters.get("factor") or config.max_position_embeddings / original)
        factor = float(parameters.get("attention_factor") or _attention_factor(ratio, original))
        extra = {"rope.scaling.attn_factor": factor, "rope.scaling.original_context_length": original}
        parameters["rope_type"] = "default"
    rope, _ = rotary(parameters, config, source.head_dim)
    context = int(config.max_position_embeddings)
    notes = list[str]()
    window = stated.get("sliding_window")
    if window and window < context:
        context = int(window)
        notes.append(f"the file promises a context of {context} tokens, the model's sliding window")
    metadata: Metadata = {
        "vocab_size": source.vocabulary,
        "context_length": context,
        "embedding_length": source.width,
        "block_count": len(source.sizes),
        "feed_forward_length": size.ffn,
        "attention.head_count": size.query_heads,
        "attention.head_count_kv": size.kv_heads,
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": 0,
        **{f"rope.{key}": value for key, value in rope.items()},
        **extra,
    }
    names = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    entries = [outside(source, source.family.embedding, "token_embd"), *tables]
    for index in range(len(source.sizes)):
        for module, stem in {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.items():
            entries.append(norm(source, f"{source.family.layers}.{index}.{module}", f"blk.{index}.{stem}", index))
        entries += [_matrix(source, index, module, stem, turned=False) for module, stem in names.items()]
    entries.append(norm(source, source.family.final_norm, "output_norm"))
    if not source.tied:
        entries.append(outside(source, source.family.head, "output"))
    return Layout("phi3", metadata, tuple(entries), context, tuple(notes))


def gpt2(source: Source) -> Layout:
    """Returns the file of a GPT-2, whose matrices are stored (in, out) and turned here."""
    config, size = source.config, source.sizes[0]
    metadata: Metadata = {
        "vocab_size": source.vocabulary,
        "context_length": int(config.n_positions),
        "embedding_length": source.width,
        "block_count": len(source.sizes),
        "feed_forward_length": size.ffn,
        "attention.head_count": size.query_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }
    positions = "transformer.wpe.weight"
    names = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    entries = [
        outside(source, source.family.embedding, "token_embd"),
        Entry("position_embd.weight", (int(config.n_positions), source.width), _tensor(source, positions), exact=True),
    ]
    for index in range(len(source.sizes)):
        for module, stem in {"ln_1": "attn_norm", "ln_2": "ffn_norm"}.items():
            entries += _layer_norm(source, f"{source.family.layers}.{index}.{module}", f"blk.{index}.{stem}", index)
        for module, stem in names.items():
            entries.append(_matrix(source, index, module, stem, turned=True))
            bias = f"{source.family.layers}.{index}.{module}.bias"
            shape = source.shapes[bias]
            entries.append(Entry(f"blk.{index}.{stem}.bias", shape, _tensor(source, bias), exact=True, layer=index))
    entries += _layer_norm(source, source.family.final_norm, "output_norm", -1)
    if not source.tied:
        entries.append(outside(source, source.family.head, "output"))
    return Layout("gpt2", metadata, tuple(entries), int(config.n_positions))


def _attention_factor(ratio: float, original: int) -> float:
    """Returns the factor on queries and keys of longrope (arXiv 2402.13753, section 3.3), as transformers computes it."""
    return 1.0 if ratio <= 1.0 else (1.0 + torch.log(torch.tensor(ratio)).item() / torch.log(torch.tensor(float(original))).item()) ** 0.5


def _tensor(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: source.tensor(name)


def _matrix(source: Source, index: int, module: str, stem: str, *, turned: bool) -> Entry:
    name = f"{source.family.layers}.{index}.{module}"
    shape = source.shapes[f"{name}.weight"]

    def make() -> Tensor:
        tensor = source.tensor(f"{name}.weight")
        return tensor.T if turned else tensor

    place = f"blk.{index}.{stem}.weight"
    if turned:
        return Entry(place, shape[::-1], make, reads=name, layer=index)
    return Entry(place, shape, make, reads=name, layer=index, pieces=lambda: source.pieces(f"{name}.weight", 1))


def _layer_norm(source: Source, module: str, stem: str, layer: int) -> list[Entry]:
    entries = [norm(source, module, stem, layer)]
    shape = source.shapes[f"{module}.bias"]
    return [*entries, Entry(f"{stem}.bias", shape, _tensor(source, f"{module}.bias"), exact=True, layer=layer)]
