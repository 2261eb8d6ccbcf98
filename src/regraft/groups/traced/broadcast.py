"""Operations on label tensors: expand, repeat, and compare along axes."""
# pyright: standard
# (NumPy and torch leave most types unknown)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.groups.traced.interpreter import Follower
from regraft.groups.traced.labels import Labels
from regraft.groups.traced.values import Channels


def grown(state: Follower, labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Expands labels to a shape; each copy gets a new label."""
    if tuple(labels.shape) == tuple(shape):
        return labels
    places = torch.arange(labels.numel()).reshape(labels.shape).expand(shape)
    return _own(state, labels.expand(shape), places)


def heads_repeated(state: Follower, labels: Tensor, heads: int) -> Tensor:
    """Repeats key-value heads, axis -3, for every query head of their group."""
    repeats = heads // labels.shape[-3]
    if repeats == 1:
        return labels
    places = torch.arange(labels.numel()).reshape(labels.shape).repeat_interleave(repeats, dim=-3)
    return _own(state, labels.repeat_interleave(repeats, dim=-3), places)


def _own(state: Follower, labels: Tensor, places: Tensor) -> Tensor:
    """Gives each copy a new label; ``places`` holds the index of the element that each is a copy of."""
    fresh = state.space.copies(labels.reshape(-1).numpy(), ordinals(places.reshape(-1).numpy()))
    return torch.from_numpy(fresh).reshape(labels.shape)


def broadcast(state: Follower, value: Channels, shape: Sequence[int], others: Sequence[Channels]) -> Tensor:
    """Expands an operand of a pointwise operator; its copies get new labels if they are combined with different channels."""
    plain, rank = value.labels.expand(shape), value.labels.dim()
    new = [axis for axis in range(-len(shape), 0) if -axis > rank or plain.shape[axis] != value.labels.shape[axis]]
    for other in others:
        labels = other.labels.expand(shape)
        if any(constant_along(labels, [labels.dim() + axis]) is None for axis in new):
            return grown(state, value.labels, shape)
    return plain.contiguous()


def ordinals(places: Labels) -> Labels:
    """Returns, for each element, how often its value occurs before it.

    >>> ordinals(np.array([5, 5, 7, 5])).tolist()
    [0, 1, 0, 2]
    """
    order = np.argsort(places, kind="stable")
    sorted_places = places[order]
    first = np.concatenate([[True], sorted_places[1:] != sorted_places[:-1]])
    starts = np.maximum.accumulate(np.where(first, np.arange(len(places)), 0))
    found = np.empty(len(places), dtype=np.int64)
    found[order] = np.arange(len(places)) - starts
    return found


def constant_along(labels: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Returns the labels with the axes ``dims`` reduced to length 1, or None where they differ along them."""
    kept = labels.amax(dim=list(dims), keepdim=True)
    return kept if bool((labels == kept).all()) else None


def rows_of(labels: Tensor, dims: Sequence[int]) -> Tensor:
    """Returns the labels as a matrix: one column for each index along the axes ``dims``, one row for each index along the others."""
    rest = [axis for axis in range(labels.dim()) if axis not in dims]
    size = int(np.prod([labels.shape[axis] for axis in dims]))
    return labels.permute(*rest, *dims).reshape(-1, size)


def dims_of(positional: Sequence[Any], named: Any, rank: int, default: int | None = None) -> list[int]:
    """Returns the axes that an operator works along, from its arguments; all axes when it names none."""
    match positional[0] if positional else named.get("dim", default):
        case int(dim) if not isinstance(dim, bool):
            return [dim % rank]
        case [_, *_] as dims:
            return [int(dim) % rank for dim in dims]
        case _:
            return list(range(rank))
