"""Discovery of a model's groups: from its family's table where the table declares them, else by tracing the computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from regraft.errors import ModelError
from regraft.groups import declared, traced
from regraft.groups.mixer_heads import mixer_head_groups
from regraft.groups.traced import Refusal, Traced
from regraft.models.build import why_layers_are_alike
from regraft.models.family import matches
from regraft.models.view import ModelView, refuse_factored
from regraft.plans import Group, GroupKind, Groups, Member

USUAL: tuple[GroupKind, ...] = ("heads", "ffn")


def discover(model: PreTrainedModel | ModelView, kinds: Sequence[GroupKind] = USUAL) -> Groups:
    """Returns the groups of a model that can be cut exactly and saved.

    Args:
        model: A model of a known family; its layers may differ from one another, or lack a part.
        kinds: Kinds of groups to return. Kinds that the model lacks, or that cannot be cut in it, are left out; :func:`refusals` gives
            the reasons.

    Returns:
        Groups in the order of the layers, the residual width last.

    Raises:
        ModelError: The family is not known, its computation cannot be traced, or the model has no group of these kinds.
    """
    return look_for(model, kinds).groups


def look_for(model: PreTrainedModel | ModelView, kinds: Sequence[GroupKind] = USUAL) -> Traced:
    """Returns the groups that :func:`discover` returns, with the reasons why other groups of these kinds cannot be cut.

    Raises:
        ModelError: As in :func:`discover`.
    """
    view = _view_of(model)
    refuse_factored(view.model)
    if view.family.discovery == "declared" and set(kinds) <= set(USUAL):
        groups, refused = declared.discover(view), ()
    else:
        found = _traced(view)
        groups, refused = found.groups, found.refusals
    wanted = tuple(group for group in groups.groups if group.kind in kinds)
    if not wanted:
        reasons = "; ".join(dict.fromkeys(f"{refusal.kind}: {refusal.reason}" for refusal in refused if refusal.kind in kinds))
        raise ModelError(
            f"nothing to prune in this {view.family.model_type}: it has no {' or '.join(kinds)} that can be cut"
            + (f" ({reasons})" if reasons else "")
            + "; choose another target"
        )
    return Traced(replace(groups, groups=wanted), tuple(refusal for refusal in refused if refusal.kind in kinds))


def refusals(model: PreTrainedModel | ModelView) -> tuple[Refusal, ...]:
    """Returns the groups of a model that cannot be cut, with the reasons.

    Raises:
        ModelError: The family is not known, or its computation cannot be traced.
    """
    return _traced(_view_of(model)).refusals


def _view_of(model: PreTrainedModel | ModelView) -> ModelView:
    return model if isinstance(model, ModelView) else ModelView(model)


def _unlike_table(view: ModelView, group: Group) -> str:
    """Returns why a part of a layer cannot be removed: this model computes with other modules in it than its family; else nothing."""
    if group.kind not in ("attention", "mlp"):
        return ""
    prefix = f"{view.layer_name(group.layer or 0)}."
    modules = tuple(f"{module}." for module in view.family.parts(view.model.config)[group.kind])
    owned = {name.removeprefix(prefix) for name, _ in view.model.named_parameters() if name.startswith(prefix)}
    different = sorted(
        {member.parameter.removeprefix(prefix) for member in group.members} ^ {name for name in owned if name.startswith(modules)}
    )
    return f"'{prefix}{different[0]}' serves more than its {group.kind} in some models of this family" if different else ""


def _bound_layers(view: ModelView) -> dict[int, str]:
    """Returns the layers that have to stay, with the reason: their keys and values serve others, or the last one has to be the last."""
    config, count = view.model.config.to_dict(), len(view.layers)
    types = config.get("layer_types") or ["" for _ in range(count)]
    found: dict[int, str] = {}
    for key in view.family.keys.last_layers:
        first = count - (config.get(key) or 0)
        for kind in dict.fromkeys(types[first:]):
            layer = max((index for index in range(first) if types[index] == kind), default=None)
            if layer is not None:
                found[layer] = f"layers after it use the keys and values of '{view.layer_name(layer)}'"
    if view.family.last_layer_stays:
        found[count - 1] = f"its family has a layer type of its own for the last layer, '{view.layer_name(count - 1)}'"
    return found


def _with_slices(view: ModelView, group: Group) -> Group:
    """Returns the group of a whole layer with the slices that parameters outside the layers hold for it."""
    if group.kind != "layer" or group.layer is None:
        return group
    slices: list[Member] = []
    own = 0
    for name, axis in view.family.for_each_layer.items():
        shape = view.model.get_parameter(name).shape
        size = shape[axis] // len(view.layers)
        slices.append(Member(name, axis, "out", offset=group.layer * size, size=size))
        own += size * math.prod(shape) // shape[axis]
    return replace(group, members=(*group.members, *slices), unit_parameters=group.unit_parameters + own)


def _traced(view: ModelView) -> Traced:
    """Traces a model; refuses the groups that the classes of its family cannot express after a cut."""
    family, config = view.family, view.model.config
    found = traced.follow_channels(
        view.model,
        numbered_heads=family.has_alibi(config),
        counted_layer_norms=family.norm == "layer",
        rescaled_norms=tuple(family.head_norms),
        mlp=tuple(family.mlp_parts or (family.mlp,)),
        whole=family.whole,
    )
    fixed = [Refusal(entry.kind, None, entry.why) for entry in family.fixed if matches(entry.when, config)]
    barred = {refusal.kind for refusal in fixed}
    odd = {group.name: Refusal(group.kind, group.layer, why) for group in found.groups.groups if (why := _unlike_table(view, group))}
    bound = _bound_layers(view)
    odd |= {g.name: Refusal("layer", g.layer, bound[g.layer]) for g in found.groups.groups if g.kind == "layer" and g.layer in bound}
    fixed += odd.values()
    kept = tuple(_with_slices(view, group) for group in found.groups.groups if group.kind not in barred and group.name not in odd)
    counts = {group.units for group in kept if group.kind == "query_heads"}
    if len(counts) > 1 and why_layers_are_alike(config, "query_heads"):
        why = f"its layers have {min(counts)} to {max(counts)} query heads for a key-value head, and one number of query heads"
        fixed.append(Refusal("query_heads", None, why))
        kept = tuple(group for group in kept if group.kind != "query_heads")
    mixers, unknown = mixer_head_groups(view)
    inside = [group for group in (*kept, *mixers) if group.layer is not None]
    ordered = (*sorted(inside, key=lambda group: group.layer or 0), *(group for group in kept if group.layer is None))
    return Traced(replace(found.groups, groups=ordered), (*found.refusals, *fixed, *unknown))
