"""Cutting of experts: the same number in every layer, which stock classes hold."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from regraft.compat import attention_kernel
from regraft.errors import PlanError
from regraft.groups.experts import COUNT_KEYS
from regraft.models.build import refuse_misfits, stored_alike
from regraft.models.quiet import quiet
from regraft.plans import Groups, PrunePlan
from regraft.surgery.cut import check_plan, cut_state, without_doubles


def cut_experts(model: PreTrainedModel, groups: Groups, plan: PrunePlan) -> PreTrainedModel:
    """Returns the model without the experts that a plan removes; it computes what the model does whose router never chooses these.

    Args:
        model: The model; the result shares every tensor that is not cut with it.
        groups: What :func:`regraft.groups.experts.expert_groups` returned.
        plan: The experts to keep.

    Raises:
        PlanError: The plan belongs to another model, or keeps other numbers in different layers.
    """
    check_plan(groups, plan)
    kept = {entry.group: len(entry.kept) for entry in plan.cuts}
    counts = {kept.get(group.name, group.units) for group in groups.groups}
    if len(counts) != 1:
        raise PlanError(f"the plan keeps {min(counts)} to {max(counts)} experts in different layers; keep the same number in all")
    config: Any = copy.deepcopy(model.config)
    before = groups.groups[0].units
    keys = {config.attribute_map.get(key, key) for key in COUNT_KEYS}
    for key in keys:
        if vars(config).get(key) == before:
            setattr(config, key, min(counts))
    model_class: Any = type(model)
    with quiet():
        smaller, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=cut_state(without_doubles(model), groups, plan.cuts),
            dtype=model.dtype,
            device_map={"": model.device} if model.device.type != "cpu" else None,
            attn_implementation=attention_kernel(model.config),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_misfits(report)
    stored_alike(smaller, model)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    smaller.config.name_or_path = smaller.name_or_path = model.name_or_path
    return smaller.train(model.training)
