"""The modules an adapter can be put on, all seen as one linear map ``y = W x`` with W ``(out, in)``.

``nn.Linear`` stores W, GPT-2's ``Conv1D`` its transpose, and an embedding is the map of one-hot inputs: its table is ``(in, out)``
with a row for every token.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SITES = (nn.Linear, Conv1D, nn.Embedding)


def is_site(module: nn.Module) -> bool:
    """Returns whether an adapter can be put on a module."""
    return isinstance(module, SITES)


def oriented(module: nn.Module, stored: Tensor) -> Tensor:
    """Turns a tensor of the shape of a module's weight to ``(out, in)``, or one of that shape back; a view."""
    return stored if isinstance(module, nn.Linear) else stored.T


def weight_of(module: nn.Module) -> Tensor:
    """Returns the weight of a site as it is stored."""
    return cast(Tensor, module.weight)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Returns ``(out, in)`` of a site."""
    rows, columns = oriented(module, weight_of(module)).shape
    return rows, columns
