"""Pruning with re-fitting: first the cuts that change the inputs of all projections, then the cuts within layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.plans import WHOLE, Cut, Group, GroupKind, Groups, PrunePlan
from regraft.surgery.bridge import bridge
from regraft.surgery.cut import cut, layers_after
from regraft.surgery.refit_layerwise import RefitMethod, compensate

# Kinds of groups whose channels have a single reading projection, which can be re-fitted.
REFITTED: tuple[GroupKind, ...] = ("heads", "query_heads", "mixer_heads", "ffn")


def apply_plan(
    view: ModelView,
    groups: Groups,
    plan: PrunePlan,
    windows_NT: Tensor,
    method: RefitMethod | None,
    source_N: Tensor | None = None,
    *,
    bridged: bool = False,
) -> PreTrainedModel:
    """Returns the pruned model, re-fitted on calibration text.

    Layers, parts of layers and the width of the stream are cut first. The projections are then re-fitted inside the remaining model: to
    its inputs, and to the outputs that they have in it.

    Args:
        view: The model before pruning; it is not changed.
        groups: Groups of the model.
        plan: The units to keep.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        method: Method of re-fitting the reading projections; None for no re-fit.
        source_N: Kind of text of each window, int64 (windows,); None: all windows are of one kind.
        bridged: Whether gaps that removed layers leave are bridged by the layers below them, see :mod:`regraft.surgery.bridge`.

    Raises:
        InputError: Gaps are to be bridged in a family where that is impossible.
    """
    named = groups.named()
    wide = tuple(entry for entry in plan.cuts if named[entry.group].kind not in REFITTED)
    narrow = tuple(entry for entry in plan.cuts if named[entry.group].kind in REFITTED)
    if wide:
        model = cut(view.model, groups, replace(plan, cuts=wide))
        if bridged:
            bridge(view, ModelView(model), layers_after(groups, wide), windows_NT)
        if not narrow:
            return model
        view = ModelView(model)
        found = discover(view, tuple(dict.fromkeys(named[entry.group].kind for entry in narrow)))
        narrow = renamed(groups, narrow, found, layers_after(groups, wide))
        groups, plan = found, replace(plan, fingerprint=found.fingerprint)
    plan = replace(plan, cuts=narrow)
    changed = compensate(view, groups, narrow, windows_NT, method, source_N) if method is not None else None
    return cut(view.model, groups, plan, changed)


def split_by_part(groups: Groups, cuts: Sequence[Cut]) -> tuple[tuple[Group, ...], tuple[Cut, ...]]:
    """Returns the removed layers and parts of layers, and the cuts within the remaining ones."""
    named = groups.named()
    gone = tuple(named[entry.group] for entry in cuts if named[entry.group].kind in WHOLE and not entry.kept)
    lost = {(group.kind, group.layer) for group in gone}
    part: dict[GroupKind, GroupKind] = {"heads": "attention", "query_heads": "attention", "ffn": "mlp"}

    def stays(group: Group) -> bool:
        return ("layer", group.layer) not in lost and (part.get(group.kind), group.layer) not in lost

    return gone, tuple(entry for entry in cuts if named[entry.group].kind in REFITTED and stays(named[entry.group]))


def renamed(groups: Groups, cuts: Sequence[Cut], found: Groups, layers: Sequence[int]) -> tuple[Cut, ...]:
    """Renames cuts within layers after layers were removed; cuts of removed groups are dropped.

    Args:
        groups: Groups before the removal.
        cuts: Cuts by the old names.
        found: Groups after the removal.
        layers: Old indices of the kept layers.
    """
    place = {old: new for new, old in enumerate(layers)}
    named, there = groups.named(), found.named()
    moved = [Cut(f"layers.{place.get(named[entry.group].layer or 0)}.{named[entry.group].kind}", entry.kept) for entry in cuts]
    return tuple(entry for entry in moved if entry.group in there)
