"""Cutting of a model by a plan: index every coupled axis by the kept units, drop removed layers and parts, and correct the norms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import PlanError
from regraft.models.build import build
from regraft.models.view import LayerSizes, ModelView
from regraft.plans import WHOLE, Cut, Groups, PrunePlan
from regraft.surgery.rescale import config_changes, rescaled


def cut(model: PreTrainedModel, groups: Groups, plan: PrunePlan, changed: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """Returns the pruned model, which computes the same as the model with the removed units set to zero.

    Args:
        model: The model that the groups were found in; the result shares every tensor that is not cut with it.
        groups: Groups of the model.
        plan: The units to keep.
        changed: Parameters that replace the model's own, at full size: the result of :mod:`regraft.surgery.refit_layerwise`.

    Raises:
        PlanError: The plan belongs to another model, or names a group or a unit that this model lacks.
    """
    check_plan(groups, plan)
    view = ModelView(model)
    state = cut_state(changed_state(without_doubles(model), changed or {}), groups, plan.cuts)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    state = rescaled(state, groups, plan.cuts, view.family, tied=tied)
    layers = layers_after(groups, plan.cuts)
    sizes = sizes_after(view, groups, plan.cuts)
    return build(
        model,
        [sizes[layer] for layer in layers],
        renumbered(state, view.family.layers, layers),
        layers=layers,
        changes=config_changes(groups, plan.cuts, view.family, model.config),
    )


def check_plan(groups: Groups, plan: PrunePlan) -> None:
    """Refuses a plan that does not fit the groups of a model.

    Raises:
        PlanError: The fingerprint differs; a group or unit does not exist or is named twice; a group of heads or channels would become
            empty; or the model would lose all layers.
    """
    if plan.fingerprint != groups.fingerprint:
        raise PlanError(f"the plan is for model {plan.fingerprint}, this is model {groups.fingerprint}; plan this model again")
    named = groups.named()
    for entry in plan.cuts:
        if entry.group not in named:
            raise PlanError(f"the plan cuts '{entry.group}', which this model has not; plan this model again")
        group = named[entry.group]
        ascending = all(first < second for first, second in pairwise(entry.kept))
        empty = not entry.kept and group.kind not in WHOLE
        if empty or not ascending or any(not 0 <= unit < group.units for unit in entry.kept):
            raise PlanError(
                f"the plan keeps units of '{entry.group}' that are empty, not ascending or outside 0 to {group.units - 1}; "
                "plan this model again"
            )
    twice = [name for name, count in Counter(entry.group for entry in plan.cuts).items() if count > 1]
    if twice:
        raise PlanError(f"the plan cuts '{twice[0]}' twice; plan this model again")
    if not layers_after(groups, plan.cuts):
        raise PlanError(f"the plan removes all {groups.layers} layers; keep one at least")


def check_counts(groups: Groups, plan: PrunePlan) -> None:
    """Refuses a plan whose numbers of parameters do not match its cuts.

    Raises:
        PlanError: The numbers differ; the message gives the right ones.
    """
    left = parameters_after(groups.shapes, groups, plan.cuts)
    if (plan.parameters_before, plan.parameters_after) != (groups.parameters, left):
        raise PlanError(
            f"the plan says {plan.parameters_before:,} parameters before and {plan.parameters_after:,} after, its cuts take this model "
            f"from {groups.parameters:,} to {left:,}; plan this model again"
        )


def cut_state(state: Mapping[str, Tensor], groups: Groups, cuts: tuple[Cut, ...]) -> dict[str, Tensor]:
    """Returns a state dict without the removed units; tensors that are not cut are shared.

    Args:
        state: Parameter name to tensor, for at least all members of the cut groups.
        groups: Groups of the model.
        cuts: The units to keep.
    """
    gone = removed_parameters(groups, cuts)
    result = {name: tensor for name, tensor in state.items() if name not in gone}
    for (parameter, axis), removed in removed_indices(groups, cuts).items():
        if parameter in gone:
            continue
        tensor = result[parameter]
        keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
        keep[sorted(removed)] = False
        result[parameter] = tensor.index_select(axis, keep.nonzero().squeeze(1).to(tensor.device)).contiguous()
    for (parameter, axis), entries in removed_inside(groups, cuts).items():
        result[parameter] = without_inside(result[parameter], axis, entries)
    return result


def changed_state(state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with the changed tensors in place of the old ones, in the dtypes of these."""
    return {name: changed[name].to(tensor.dtype) if name in changed else tensor for name, tensor in state.items()}


def removed_indices(groups: Groups, cuts: tuple[Cut, ...]) -> dict[tuple[str, int], set[int]]:
    """Returns the removed indices for each (parameter, axis); fused projections collect those of all their members.

    Parameters of removed layers and parts are not included (see :func:`removed_parameters`), but the slices that others hold for them.
    """
    named = groups.named()
    removed: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for entry in cuts:
        group = named[entry.group]
        gone = sorted(set(range(group.units)) - set(entry.kept))
        for member in group.members:
            if group.kind in WHOLE and not groups.holds_slice(member):
                continue
            for unit in gone if member.entry is None else ():
                removed[member.parameter, member.axis].update(member.indices(unit))
    return dict(removed)


def removed_inside(groups: Groups, cuts: tuple[Cut, ...]) -> dict[tuple[str, int], dict[int, set[int]]]:
    """Returns the indices that single entries of a stack lose, for each (parameter, axis): by index of the entry on the first axis.

    Raises:
        PlanError: Entries of one stack lose different numbers of indices.
    """
    named = groups.named()
    removed: defaultdict[tuple[str, int], dict[int, set[int]]] = defaultdict(dict)
    for entry in cuts:
        group = named[entry.group]
        gone = sorted(set(range(group.units)) - set(entry.kept))
        for member in group.members:
            if member.entry is not None and gone:
                lost = removed[member.parameter, member.axis].setdefault(member.entry, set())
                lost.update(index for unit in gone for index in member.indices(unit))
    for (parameter, _), entries in removed.items():
        counts = {len(lost) for lost in entries.values()}
        if len(counts) > 1 or len(entries) != groups.shapes[parameter][0]:
            raise PlanError(f"the plan cuts experts in '{parameter}' to different widths, and a stack has one; plan this model again")
    return dict(removed)


def without_inside(tensor: Tensor, axis: int, entries: Mapping[int, Collection[int]]) -> Tensor:
    """Returns a stack of which each entry loses indices of its own along an axis."""
    kept: list[Tensor] = []
    for entry, lost in sorted(entries.items()):
        keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
        keep[sorted(lost)] = False
        kept.append(tensor[entry].index_select(axis - 1, keep.nonzero().squeeze(1).to(tensor.device)))
    return torch.stack(kept)


def removed_parameters(groups: Groups, cuts: tuple[Cut, ...]) -> set[str]:
    """Returns the names of all parameters of removed layers and parts."""
    named = groups.named()
    gone = [named[entry.group] for entry in cuts if named[entry.group].kind in WHOLE and not entry.kept]
    return {member.parameter for group in gone for member in group.members if not groups.holds_slice(member)}


def layers_after(groups: Groups, cuts: tuple[Cut, ...]) -> tuple[int, ...]:
    """Returns the indices of the kept layers."""
    named = groups.named()
    gone = {named[entry.group].layer for entry in cuts if named[entry.group].kind == "layer" and not entry.kept}
    return tuple(layer for layer in range(groups.layers) if layer not in gone)


def parameters_after(shapes: Mapping[str, Sequence[int]], groups: Groups, cuts: tuple[Cut, ...]) -> int:
    """Returns the exact number of remaining parameters, also where cuts overlap (a head inside a narrower stream).

    Args:
        shapes: Parameter name to shape, tied ones once.
        groups: Groups of the model.
        cuts: The units to keep.
    """
    gone = removed_parameters(groups, cuts)
    left = {name: list(shape) for name, shape in shapes.items() if name not in gone}
    for (parameter, axis), removed in removed_indices(groups, cuts).items():
        if parameter in left:
            left[parameter][axis] -= len(removed)
    for (parameter, axis), entries in removed_inside(groups, cuts).items():
        left[parameter][axis] -= max(map(len, entries.values()))
    return sum(math.prod(shape) for shape in left.values())


def renumbered(state: Mapping[str, Tensor], prefix: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Returns a state dict with the kept layers renumbered from zero.

    Args:
        state: Parameter name to tensor.
        prefix: Module name of the list of layers.
        layers: Indices of the kept layers, ascending.
    """
    return {new: state[name] for new, name in renumbered_names(state, prefix, layers).items()}


def renumbered_names(names: Iterable[str], prefix: str, layers: Sequence[int]) -> dict[str, str]:
    """Returns new name to old name, as :func:`renumbered` renames parameters."""
    place = {str(old): new for new, old in enumerate(layers)}
    result: dict[str, str] = {}
    for name in names:
        if not name.startswith(f"{prefix}."):
            result[name] = name
            continue
        index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if index in place:
            result[f"{prefix}.{place[index]}.{rest}"] = name
    return result


def sizes_after(view: ModelView, groups: Groups, cuts: tuple[Cut, ...]) -> list[LayerSizes]:
    """Returns the sizes of every layer after the cuts, including layers that are removed."""
    kept = {(groups.named()[entry.group].kind, groups.named()[entry.group].layer): entry.kept for entry in cuts}
    found: list[LayerSizes] = []
    for layer in range(len(view.layers)):
        sizes = view.sizes(layer)
        repeats = sizes.query_heads // sizes.kv_heads if sizes.kv_heads else 0
        groups_kept = kept.get(("heads", layer), tuple(range(sizes.kv_heads)))
        queries_kept = kept.get(("query_heads", layer), tuple(range(repeats)))
        if not kept.get(("attention", layer), (0,)):
            groups_kept = ()
        ffn = len(kept.get(("ffn", layer), range(sizes.ffn))) if kept.get(("mlp", layer), (0,)) else 0
        heads = [group * repeats + query for group in groups_kept for query in queries_kept]
        slopes = tuple(sizes.slopes[head] for head in heads) if sizes.slopes else ()
        mixer = _mixer_after(sizes.mixer, kept.get(("mixer_heads", layer)), evenly=view.family.keys.mixer_evenly)
        found.append(LayerSizes(len(heads), len(groups_kept), sizes.head_dim, ffn, slopes, sizes.absent, mixer))
    return found


def _mixer_after(mixer: tuple[int, int], kept: Sequence[int] | None, *, evenly: bool) -> tuple[int, int]:
    """Returns the numbers of key heads and value heads of a mixer after a cut.

    Args:
        mixer: The numbers before.
        kept: The units that stay; None where the mixer is not cut.
        evenly: Whether a unit is a value head of every key head, in place of a key head with its value heads.
    """
    keys, values = mixer
    if kept is None or not keys:
        return mixer
    return (keys, keys * len(kept)) if evenly else (len(kept), len(kept) * values // keys)


def without_doubles(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns a state dict with each tied parameter once, under the name that groups use."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in every or names[id(every[name])] == name}
