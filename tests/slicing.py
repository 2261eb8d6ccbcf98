"""Slicing and zeroing written for the tests alone: what pruned models are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.models.view import LayerSizes


@dataclass(frozen=True)
class Kept:
    """What stays of one layer: key-value heads (with their query heads) and feed-forward channels; empty for none."""

    groups: Sequence[int]
    channels: Sequence[int]


def sliced(model: PreTrainedModel, kept: Sequence[Kept]) -> tuple[list[LayerSizes], dict[str, Tensor]]:
    """Returns the sizes and the tensors of the pruned model; norms of removed parts are left in."""
    config = model.config
    width, repeats = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor
        if ".layers." not in name:
            continue
        layer = kept[int(name.split(".layers.")[1].split(".")[0])]
        keys = torch.tensor([g * width + c for g in layer.groups for c in range(width)], dtype=torch.long)
        queries = torch.tensor([g * repeats * width + c for g in layer.groups for c in range(repeats * width)], dtype=torch.long)
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": layer.channels, "up_proj": layer.channels}
        columns = {"o_proj": queries, "down_proj": layer.channels}
        module, kind = name.split(".")[-2:]
        if module in rows:
            state[name] = tensor[torch.as_tensor(rows[module], dtype=torch.long)].clone()
        elif module in columns and kind == "weight":
            state[name] = tensor[:, torch.as_tensor(columns[module], dtype=torch.long)].clone()
    sizes = [LayerSizes(len(k.groups) * repeats, len(k.groups), width, len(k.channels)) for k in kept]
    return sizes, state


def zeroed(model: PreTrainedModel, kept: Sequence[Kept]) -> PreTrainedModel:
    """Returns the whole model with what goes multiplied by nothing; a part that goes whole loses its output bias too."""
    model = copy.deepcopy(model)
    config = model.config
    width = config.head_dim * (config.num_attention_heads // config.num_key_value_heads)
    with torch.no_grad():
        for layer, entry in zip(model.get_decoder().layers, kept, strict=True):
            for group in set(range(config.num_key_value_heads)) - set(entry.groups):
                layer.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0.0
            for channel in set(range(config.intermediate_size)) - set(entry.channels):
                layer.mlp.down_proj.weight[:, channel] = 0.0
            for part, left in ((layer.self_attn.o_proj, entry.groups), (layer.mlp.down_proj, entry.channels)):
                if not left and part.bias is not None:
                    part.bias.zero_()
    return model


def ids(model: PreTrainedModel, batch: int = 2, tokens: int = 21) -> Tensor:
    """Returns random token ids (batch, tokens), int64."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)


def files_of(folder: Path) -> Mapping[str, bytes]:
    """Returns the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
