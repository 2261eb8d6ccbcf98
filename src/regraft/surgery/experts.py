"""Cutting of experts and of their channels: into the stock class where all layers stay alike, else into our own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from regraft.groups.experts import COUNT_KEYS, WIDTH_KEYS, experts_of
from regraft.models.build import config_for, load_state
from regraft.models.view import ModelView
from regraft.plans import Groups, PrunePlan
from regraft.surgery.cut import check_plan, cut_state, without_doubles


def cut_experts(model: PreTrainedModel, groups: Groups, plan: PrunePlan) -> PreTrainedModel:
    """Returns the model without the experts, or without the channels of experts, that a plan removes.

    Without experts it computes what the model does whose router never chooses these; without channels, what the model does in which these
    are zero.

    Args:
        model: The model; the result shares every tensor that is not cut with it.
        groups: What :mod:`regraft.groups.experts` found.
        plan: The units to keep.

    Raises:
        PlanError: The plan belongs to another model, or the model's class cannot have what it leaves.
    """
    check_plan(groups, plan)
    config = config_of_experts(ModelView(model), groups, plan)
    return load_state(model, config, cut_state(without_doubles(model), groups, plan.cuts))


def config_of_experts(view: ModelView, groups: Groups, plan: PrunePlan) -> PreTrainedConfig:
    """Returns the config of what a plan leaves of a model with experts.

    Args:
        view: The model before the cut.
        groups: The groups that the plan cuts: experts, or channels of experts.
        plan: The units to keep.
    """
    kept = {entry.group: len(entry.kept) for entry in plan.cuts}
    base: Any = view.model.config
    before = {group.layer or 0: group.units for group in groups.groups}
    after = {group.layer or 0: kept.get(group.name, group.units) for group in groups.groups}
    keys = _keys(view, groups, before)
    if len({*after.values()}) == 1 and len({*before.values()}) == 1 and not base.model_type.startswith("regraft_"):
        config = copy.deepcopy(base)
        for key in keys:
            setattr(config, key, next(iter(after.values())))
        return config
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    beside: Mapping[int, Mapping[str, int]] = {layer: dict.fromkeys(keys, count) for layer, count in after.items()}
    return config_for(base, sizes, beside=beside)


def _keys(view: ModelView, groups: Groups, before: Mapping[int, int]) -> list[str]:
    """Returns the config keys of what is cut: those that hold the number before the cut, in the first layer that has experts."""
    config: Any = view.model.config
    kind = groups.groups[0].kind
    layer = min(before)
    here = config.per_layer_config[layer]
    names = dict.fromkeys(config.attribute_map.get(key, key) for key in (COUNT_KEYS if kind == "experts" else WIDTH_KEYS))
    found = [key for key in names if key in here.to_dict() and getattr(here, key, None) == before[layer]]
    if kind == "experts":
        return found
    module: Any = type(experts_of(view.model)[0].module)
    return [key for key in found if _decides(module, here, key, before[layer])][:1]


def _decides(module: Any, config: Any, key: str, units: int) -> bool:
    """Returns whether a config key decides the channels of experts: it may be a dense network's, or one that nothing reads."""
    changed = copy.copy(config)
    setattr(changed, key, units + 1)
    with torch.device("meta"):
        shapes = [tuple(module(one).down_proj.shape) for one in (config, changed)]
    return shapes[0] != shapes[1]
