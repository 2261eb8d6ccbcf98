"""Cut a model to a plan: index every coupled axis by the units that stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import PlanError
from regraft.models.build import build
from regraft.models.view import LayerSizes, ModelView
from regraft.plans import Cut, Group, Groups, PrunePlan


def cut(model: PreTrainedModel, groups: Groups, plan: PrunePlan, changed: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Returns the pruned model; removing a unit gives what zeroing it would give.

    Args:
        model: The model that the groups were found in; it shares every tensor that is not cut with the result.
        groups: Of that model.
        plan: What stays.
        changed: Parameters to take in place of the model's own, at full size: what :func:`regraft.surgery.compensate` gives.

    Raises:
        PlanError: The plan is of another model, or names a group or a unit that this model has not.
    """
    check_plan(groups, plan)
    state = cut_state(changed_state(model.state_dict(), changed or {}), groups, plan.cuts)
    return build(model, sizes_after(ModelView(model), groups, plan.cuts), state)


def check_plan(groups: Groups, plan: PrunePlan) -> None:
    """Refuses a plan that does not fit.

    Raises:
        PlanError: The fingerprint differs, or a group or unit does not exist, or a group would be left empty.
    """
    if plan.fingerprint != groups.fingerprint:
        raise PlanError(f"the plan is for model {plan.fingerprint}, this is model {groups.fingerprint}; plan this model again")
    named = groups.named()
    for entry in plan.cuts:
        if entry.group not in named:
            raise PlanError(f"the plan cuts '{entry.group}', which this model has not; plan this model again")
        units = named[entry.group].units
        ascending = all(first < second for first, second in zip(entry.kept, entry.kept[1:], strict=False))
        if not entry.kept or not ascending or entry.kept[0] < 0 or entry.kept[-1] >= units:
            raise PlanError(
                f"the plan keeps units of '{entry.group}' that are empty, not ascending or outside 0 to {units - 1}; plan this model again"
            )


def cut_state(state: Mapping[str, Tensor], groups: Groups, cuts: tuple[Cut, ...]) -> dict[str, Tensor]:
    """Returns a state dict in which the removed units are gone; tensors that are not cut are shared.

    Args:
        state: Parameter name to tensor, at least of the members of the groups that are cut.
        groups: Of the model.
        cuts: What stays.
    """
    result = dict(state)
    for (parameter, axis), removed in removed_indices(groups, cuts).items():
        tensor = result[parameter]
        keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
        keep[sorted(removed)] = False
        result[parameter] = tensor.index_select(axis, keep.nonzero().squeeze(1).to(tensor.device)).contiguous()
    return result


def changed_state(state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with changed tensors in place, in the dtype that they had."""
    return {name: changed[name].to(tensor.dtype) if name in changed else tensor for name, tensor in state.items()}


def removed_indices(groups: Groups, cuts: tuple[Cut, ...]) -> dict[tuple[str, int], set[int]]:
    """Returns the indices that go, for each parameter and axis; fused projections collect those of all their members."""
    named = groups.named()
    removed: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for entry in cuts:
        group = named[entry.group]
        gone = sorted(set(range(group.units)) - set(entry.kept))
        for member in group.members:
            for unit in gone:
                removed[member.parameter, member.axis].update(member.indices(unit))
    return dict(removed)


def sizes_after(view: ModelView, groups: Groups, cuts: tuple[Cut, ...]) -> list[LayerSizes]:
    """Returns the sizes of every layer once the cuts are made."""
    named = groups.named()
    sizes = [view.sizes(layer) for layer in range(len(view.layers))]
    for entry in cuts:
        group = named[entry.group]
        assert group.layer is not None
        sizes[group.layer] = _shrunk(sizes[group.layer], group, len(entry.kept))
    return sizes


def _shrunk(sizes: LayerSizes, group: Group, kept: int) -> LayerSizes:
    if group.kind == "ffn":
        return LayerSizes(sizes.query_heads, sizes.kv_heads, sizes.head_dim, kept)
    repeats = sizes.query_heads // sizes.kv_heads
    return LayerSizes(kept * repeats, kept, sizes.head_dim, sizes.ffn)
