"""Rank spaces over tiny models, for tests."""

from __future__ import annotations

from transformers import PreTrainedModel

from regraft.models.view import ModelView
from regraft.plans import RankPlan, RankSlot, RankSpace


def layer_space(model: PreTrainedModel, choices: tuple[int, ...] = (1, 2, 4, 6), uniform: int = 4, first: int = 0) -> RankSpace:
    """A slot for every layer from ``first`` on."""
    view = ModelView(model)
    slots = []
    for index in range(first, len(view.layers)):
        modules = {name: module for name, module in view.adapted_modules().items() if name.startswith(f"{view.layer_name(index)}.")}
        per_rank = sum(sum(module.weight.shape) for module in modules.values())
        slots.append(RankSlot(f"layers.{index}", tuple(modules), index, per_rank, 16))
    return RankSpace("any", "layer", tuple(slots), choices, uniform * sum(slot.parameters_per_rank for slot in slots), uniform)


def plan_of(space: RankSpace, ranks: tuple[int, ...]) -> RankPlan:
    """The same vector as a plan."""
    named = {module: rank for slot, rank in zip(space.slots, ranks, strict=True) for module in slot.modules}
    return RankPlan(space.fingerprint, "test", named, 2.0, space.cost(ranks))
