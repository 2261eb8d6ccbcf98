"""GGUF architecture of mixtures of experts: Qwen3-MoE, whose experts are stacked in the file as they are in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from regraft.export.gguf.llama_like import TWO_NORMS, Gated, lay_out
from regraft.export.gguf.source import Entry, Layout, Source

GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
_DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")  # what a layer without experts has, and these layers lack


def refusal(source: Source) -> str:
    """Returns why the runtime cannot hold a mixture; an empty text where it can."""
    layers = range(len(source.sizes))
    shapes = [source.shapes.get(f"{source.family.layers}.{index}.{GATE_UP}") for index in layers]
    if None in shapes:
        return "every layer must have experts"
    if len(set(shapes)) > 1:
        return "all layers must have the same number of experts, of one width"
    if len({(size.query_heads, size.kv_heads) for size in source.sizes}) > 1 or not source.sizes[0].query_heads:
        return "its layers must be alike"
    return "" if source.config.norm_topk_prob else "it makes the router's weights of a token sum to one, the model does not"


def qwen3moe(source: Source) -> Layout:
    """Returns the file of a Qwen3-MoE."""
    plain = lay_out(Gated("qwen3moe", TWO_NORMS), source)
    count, twice, _ = source.shapes[f"{source.family.layers}.0.{GATE_UP}"]
    keys = {
        "feed_forward_length": int(source.config.intermediate_size),
        "expert_count": count,
        "expert_used_count": int(source.config.num_experts_per_tok),
        "expert_feed_forward_length": twice // 2,
    }
    entries = [entry for entry in plain.entries if not entry.name.endswith(_DENSE)]
    for index in range(len(source.sizes)):
        entries += _experts(source, index)
    return replace(plain, metadata=plain.metadata | keys, entries=tuple(entries))


def _experts(source: Source, index: int) -> list[Entry]:
    prefix = f"{source.family.layers}.{index}"
    count, twice, width = source.shapes[f"{prefix}.{GATE_UP}"]
    channels = twice // 2

    def half(first: int) -> Callable[[], Tensor]:
        return lambda: source.tensor(f"{prefix}.{GATE_UP}")[:, first : first + channels].contiguous()

    return [
        Entry(f"blk.{index}.ffn_gate_inp.weight", (count, width), lambda: source.tensor(f"{prefix}.{ROUTER}"), exact=True, layer=index),
        Entry(f"blk.{index}.ffn_gate_exps.weight", (count, channels, width), half(0), layer=index),
        Entry(f"blk.{index}.ffn_up_exps.weight", (count, channels, width), half(channels), layer=index),
        Entry(f"blk.{index}.ffn_down_exps.weight", (count, width, channels), lambda: source.tensor(f"{prefix}.{DOWN}"), layer=index),
    ]
