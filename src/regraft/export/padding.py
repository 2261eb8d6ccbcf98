"""Padding of layers with zeros to equal sizes: exact, and as slow as a model in which every layer has the largest size.

A query head whose output columns are zero adds nothing, whatever it attends to; nor does a feed-forward channel whose down column is zero;
nor a whole attention or feed-forward network of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.models.build import build
from regraft.models.view import LayerSizes, ModelView

Spread = Callable[[Tensor, int], Tensor]


def uniform_sizes(sizes: Sequence[LayerSizes]) -> LayerSizes:
    """Returns the smallest sizes that hold every layer: the most key-value heads, the most query heads for each, the largest width."""
    kv_heads = max(max(size.kv_heads for size in sizes), 1)
    group = max((size.query_heads // size.kv_heads for size in sizes if size.kv_heads), default=1)
    return LayerSizes(kv_heads * group, kv_heads, sizes[0].head_dim, max(max(size.ffn for size in sizes), 1))


def next_even(size: LayerSizes, width: int) -> LayerSizes | None:
    """Returns sizes with the fewest further query heads so that these divide the width of the stream; None where none do."""
    group = size.query_heads // size.kv_heads
    counts = [(kv, per) for kv in range(size.kv_heads, width + 1) for per in range(group, width // kv + 1) if width % (kv * per) == 0]
    if not counts:
        return None
    kv_heads, per_group = min(counts, key=lambda count: (count[0] * count[1], count[0]))
    return LayerSizes(kv_heads * per_group, kv_heads, size.head_dim, size.ffn, size.slopes)


def padded(model: PreTrainedModel, targets: Sequence[LayerSizes]) -> PreTrainedModel:
    """Returns a model with its layers filled up to the given sizes.

    Args:
        model: A model of a family whose projections are separate matrices.
        targets: For each layer, at least its own sizes, key-value heads and query heads for each of them; zeros where a part stays removed.

    Raises:
        InputError: The family keeps projections together, or has norms over all heads.
    """
    view = ModelView(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    for index, target in enumerate(targets):
        size = view.sizes(index)
        if size != target:
            state |= _layer(view, state, index, size, target)
    return build(model, list(targets), state)


def refuse_fused(model: PreTrainedModel) -> None:
    """Refuses families that cannot be filled up.

    Raises:
        InputError: Projections are fused, transposed or shared.
    """
    view = ModelView(model)
    blocks = {axis.block for coupling in view.family.couplings for axis in coupling.axes}
    if "fused" in blocks or view.family.transposed or view.family.mlp_parts or view.family.alibi:
        raise InputError(
            f"layers of family '{view.family.model_type}' keep projections in one matrix, which is not filled up; export with `to=hf`, "
            "or prune with `shape=uniform`"
        )
    if view.family.mixed or {"gated", "each"} & blocks:
        raise InputError(
            f"layers of family '{view.family.model_type}' are of several kinds or have gates beside their heads, which are not filled up; "
            "export with `to=hf`, or prune with `shape=uniform`"
        )
    for name, parameter in view.layers[0].named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")) and parameter.shape[0] != view.head_dim:
            raise InputError(f"family '{view.family.model_type}' has norms over all heads, which zeros would change; export with `to=hf`")


def _layer(view: ModelView, state: Mapping[str, Tensor], index: int, size: LayerSizes, target: LayerSizes) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    like = next(iter(state.values()))
    for coupling in view.family.couplings:
        present, wanted = (size.query_heads, target.query_heads) if coupling.kind == "heads" else (size.ffn, target.ffn)
        if not wanted:
            continue
        for axis in coupling.axes:
            name = f"{view.layer_name(index)}.{axis.module}"
            dimension = 0 if axis.side == "out" else 1
            spread = _spread(axis.block, size, target)
            for part in ("weight", "bias") if axis.side == "out" else ("weight",):
                tensor = state.get(f"{name}.{part}")
                if present and tensor is not None:
                    found[f"{name}.{part}"] = spread(tensor, dimension)
            if not present:
                found |= _zeros(view, state, axis.module, dimension, _channels(axis.block, target), name, like)
        if not present:
            part = "attention" if coupling.kind == "heads" else "mlp"
            found |= _norms(view, state, index, part)
    return found


def _channels(block: str, size: LayerSizes) -> int:
    heads = {"query_group": size.query_heads, "head": size.kv_heads}
    return heads[block] * size.head_dim if block in heads else size.ffn


def _spread(block: str, size: LayerSizes, target: LayerSizes) -> Spread:
    """Returns what puts the channels of a projection to their places among those of the target."""

    def spread(tensor: Tensor, dimension: int) -> Tensor:
        moved = tensor.movedim(dimension, 0)
        if block == "query_group":
            group, wanted = size.query_heads // size.kv_heads, target.query_heads // target.kv_heads
            kept = moved.reshape(size.kv_heads, group, size.head_dim, *moved.shape[1:])
            whole = moved.new_zeros(target.kv_heads, wanted, size.head_dim, *moved.shape[1:])
            whole[: size.kv_heads, :group] = kept
        else:
            whole = moved.new_zeros(_channels(block, target), *moved.shape[1:])
            whole[: moved.shape[0]] = moved
        return whole.reshape(-1, *moved.shape[1:]).movedim(0, dimension).contiguous()

    return spread


def _zeros(
    view: ModelView, state: Mapping[str, Tensor], module: str, dimension: int, channels: int, name: str, like: Tensor
) -> dict[str, Tensor]:
    """Returns a projection of zeros, with a bias where the same projection of another layer has one."""
    shape = (channels, view.width) if dimension == 0 else (view.width, channels)
    found = {f"{name}.weight": torch.zeros(shape, dtype=like.dtype, device=like.device)}
    if any(f"{view.layer_name(other)}.{module}.bias" in state for other in range(len(view.layers))):
        found[f"{name}.bias"] = torch.zeros(shape[0], dtype=like.dtype, device=like.device)
    return found


def _norms(view: ModelView, state: Mapping[str, Tensor], index: int, part: str) -> dict[str, Tensor]:
    """Returns the norms of a part that was removed, as another layer has them; they multiply zeros, or what zeros multiply."""
    found: dict[str, Tensor] = {}
    modules = view.family.parts(view.model.config)["attention" if part == "attention" else "mlp"]
    for other in range(len(view.layers)):
        for name, tensor in state.items():
            inside = name.removeprefix(f"{view.layer_name(other)}.")
            is_norm = tensor.dim() == 1 and "norm" in inside
            if inside != name and is_norm and any(inside.startswith(f"{module}.") for module in modules):
                found.setdefault(f"{view.layer_name(index)}.{inside}", tensor.clone())
    return found
