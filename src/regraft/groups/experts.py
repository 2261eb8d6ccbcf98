"""Experts of a mixture: in each layer that has some, an expert with its row of the router is one unit, and so is a channel of an expert.

Experts are stacked in parameters whose first axis counts them, in a module that transformers calls with hidden states, the chosen experts
of each token and their weights; the router beside it has one row for each. The experts of a layer share one width, so that each loses the
same number of channels; which ones is its own.
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
WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")  # config keys of the channels of an expert; the first that a config has
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


@dataclass(frozen=True)
class Stacks:
    """How the experts of a layer compute, as transformers says of their module.

    Attributes:
        writer: Name of the stack that writes the channels: gates and values, or values alone.
        reader: Name of the stack that reads them.
        gated: Whether values are multiplied with gates.
        interleaved: Whether gates and values take turns, and do not follow one another.
        transposed: Whether a stack is (experts, inputs, outputs), and not (experts, outputs, inputs).
        biased: Whether there are biases, in parameters of the same names that end in ``_bias``.
        channels: Number of channels of each expert.
    """

    writer: str
    reader: str
    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool
    channels: int


def stacks_of(experts: Experts) -> Stacks:
    """Returns how the experts of a layer compute.

    Raises:
        ModelError: Their module does not say.
    """
    module: Any = experts.module
    try:
        gated, biased = bool(module.has_gate), bool(module.has_bias)
        transposed, interleaved = bool(module.is_transposed), not module.is_concatenated
        channels = module.down_proj.shape[1 if transposed else 2]
        writer = "gate_up_proj" if gated else "up_proj"
        written = module.get_parameter(writer).shape[2 if transposed else 1]
    except AttributeError:
        raise ModelError(f"'{experts.name}' does not say how its experts compute: their channels are not cut") from None
    if written != channels * (2 if gated else 1):
        raise ModelError(f"'{experts.name}' writes {written} and reads {channels} channels: they are not cut")
    return Stacks(writer, "down_proj", gated, interleaved, transposed, biased, channels)


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


def expert_groups(model: PreTrainedModel, known: str | None = None) -> Groups:
    """Returns one group of experts for each layer that has some.

    Args:
        model: The model.
        known: Its fingerprint, where it is known already.

    Raises:
        ModelError: The model has no experts, or a part of them that cannot be cut.
    """
    return _groups(model, tuple(_group(model, experts) for experts in experts_of(model)), known)


def channel_groups(model: PreTrainedModel, known: str | None = None) -> Groups:
    """Returns one group of channels for each expert of each layer that has some.

    Args:
        model: The model.
        known: Its fingerprint, where it is known already.

    Raises:
        ModelError: The model has no experts, or its experts do not say how they compute.
    """
    found = tuple(_channels(experts, index) for experts in experts_of(model) for index in range(experts.count))
    return _groups(model, found, known)


def _groups(model: PreTrainedModel, groups: tuple[Group, ...], known: str | None) -> Groups:
    if not groups:
        raise ModelError(f"{type(model).__name__} has no experts; choose another target")
    view = ModelView(model)
    mark = fingerprint(model) if known is None else known
    return Groups(mark, view.family.model_type, len(view.layers), parameter_count(model), groups, parameter_shapes(model))


def _channels(experts: Experts, index: int) -> Group:
    stacks = stacks_of(experts)
    blocks = [(0, 1)]
    if stacks.gated:
        blocks = [(0, 2)] if stacks.interleaved else [(0, 1), (stacks.channels, 1)]
    places = [(stacks.writer, 2 if stacks.transposed else 1), *([(f"{stacks.writer}_bias", 1)] if stacks.biased else [])]
    members = [
        Member(f"{experts.name}.{name}", axis, "out", offset=offset, size=size, entry=index)
        for name, axis in places
        for offset, size in blocks
    ]
    members.append(Member(f"{experts.name}.{stacks.reader}", 1 if stacks.transposed else 2, "in", entry=index))
    size = 0
    for member in members:
        shape = experts.module.get_parameter(member.parameter.rpartition(".")[2]).shape
        size += member.size * math.prod(shape[1:]) // shape[member.axis]
    return Group(f"layers.{experts.layer}.experts.{index}.ffn", "expert_ffn", experts.layer, stacks.channels, tuple(members), size)


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
