"""Experts of a mixture: in each layer that has some, an expert with its row of the router is one unit.

Experts are stacked in parameters whose first axis counts them, in a module that transformers calls with hidden states, the chosen experts
of each token and their weights; the router beside it has one row for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from regraft.errors import ModelError
from regraft.models.view import ModelView, fingerprint, parameter_count, parameter_shapes
from regraft.plans import Group, Groups, Member

COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")  # config keys of the number of experts in a layer
CHOSEN_KEYS = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # config keys of the number that each token is sent to


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    Attributes:
        layer: Index of the layer.
        name: Full name of the module with the stacked experts.
        module: That module; it takes hidden states (tokens, width), experts (tokens, chosen) and weights (tokens, chosen).
        count: Number of experts.
    """

    layer: int
    name: str
    module: nn.Module
    count: int


def experts_of(model: PreTrainedModel) -> tuple[Experts, ...]:
    """Returns the experts of every layer that has some, in the order of the layers."""
    view = ModelView(model)
    found: list[Experts] = []
    for index in range(len(view.layers)):
        layer: Any = view.layers[index]
        for name, module in layer.named_modules():
            stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
            if len(stacks) > 1 and len({stack.shape[0] for stack in stacks}) == 1:
                found.append(Experts(index, f"{view.layer_name(index)}.{name}", module, stacks[0].shape[0]))
    return tuple(found)


def expert_groups(model: PreTrainedModel) -> Groups:
    """Returns one group of experts for each layer that has some.

    Raises:
        ModelError: The model has no experts, or a part of them that cannot be cut.
    """
    view = ModelView(model)
    groups = tuple(_group(model, experts) for experts in experts_of(model))
    if not groups:
        raise ModelError(f"{type(model).__name__} has no experts; choose another target")
    return Groups(fingerprint(model), view.family.model_type, len(view.layers), parameter_count(model), groups, parameter_shapes(model))


def _group(model: PreTrainedModel, experts: Experts) -> Group:
    around = experts.name.rpartition(".")[0]
    block = model.get_submodule(around)
    members: list[Member] = []
    size = 0
    beside = [(name, child) for name, child in block.named_children() if child is not experts.module and _has_row_each(child, experts)]
    for prefix, module in ((experts.name, experts.module), *((f"{around}.{name}", child) for name, child in beside)):
        for name, buffer in module.named_buffers():
            if buffer.dim() and buffer.shape[0] == experts.count:
                raise ModelError(f"'{prefix}.{name}' has an entry for each expert that is no parameter: its experts are not cut")
        for name, parameter in module.named_parameters():
            if parameter.shape[0] == experts.count:
                members.append(Member(f"{prefix}.{name}", 0, "out"))
                size += math.prod(parameter.shape[1:])
    if len(beside) != 1:
        raise ModelError(f"'{around}' has {len(beside)} routers with a row for each expert, not one: its experts are not cut")
    return Group(f"layers.{experts.layer}.experts", "experts", experts.layer, experts.count, tuple(members), size)


def _has_row_each(module: nn.Module, experts: Experts) -> bool:
    """Returns whether a module beside experts is their router: all of its parameters have one row for each."""
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.shape[0] == experts.count for parameter in parameters)
