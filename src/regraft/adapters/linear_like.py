"""Modules that can be adapted, treated alike as linear maps ``y = W x`` with W ``(out, in)``.

``nn.Linear`` stores W, and GPT-2's ``Conv1D`` its transpose. An embedding is a map of one-hot inputs: its table is ``(in, out)``, with a
row for every token.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regraft.compat import own_parameters

SITES = (nn.Linear, Conv1D, nn.Embedding)


def is_site(module: nn.Module) -> bool:
    """Returns whether a module can be adapted."""
    return isinstance(module, SITES)


def is_table(module: nn.Module) -> bool:
    """Returns whether a module is an embedding, which looks up rows."""
    return isinstance(module, nn.Embedding)


def is_transposed(module: nn.Module) -> bool:
    """Returns whether a projection stores its weight as (in, out), as GPT-2's do."""
    return isinstance(module, Conv1D)


def oriented(module: nn.Module, stored: Tensor) -> Tensor:
    """Returns a view as ``(out, in)`` of a tensor in the layout of the module's weight, or the reverse."""
    return stored if isinstance(module, nn.Linear) else stored.T


def weight_of(module: nn.Module) -> Tensor:
    """Returns the weight of a module in its stored layout."""
    return cast(Tensor, module.weight)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Returns ``(out, in)`` of a module."""
    rows, columns = oriented(module, weight_of(module)).shape
    return rows, columns


def untie(model: nn.Module, module: nn.Module) -> bool:
    """Gives a module its own copy of a weight that it shares with another module, so that a change affects only one of them.

    Returns:
        Whether the weight was shared.
    """
    weight = weight_of(module)
    sharing = [other for other in model.modules() if other is not module and own_parameters(other).get("weight") is weight]
    if sharing:
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return bool(sharing)
