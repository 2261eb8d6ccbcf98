"""Record of the units that pruning removed from each group, for later stages that have only the pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regraft.plans import Cut, Groups, Provenance, PrunePlan, Removed, Scores, from_json, to_json


def removed_by(groups: Groups, scores: Scores, cuts: Sequence[Cut]) -> dict[str, Removed]:
    """Returns the number of units of every group before the cut, and the summed scores of the removed ones."""
    kept = {cut.group: set(cut.kept) for cut in cuts}
    found: dict[str, Removed] = {}
    for group in groups.groups:
        values = scores.values.get(group.name, ())
        stays = kept.get(group.name)
        gone = 0.0 if stays is None else sum(value for unit, value in enumerate(values) if unit not in stays)
        found[group.name] = Removed(group.units, max(0.0, float(gone)))
    return found


def renumbered(removed: Mapping[str, Removed], layers: Sequence[int]) -> dict[str, Removed]:
    """Returns a removal record with the group names of an earlier model, given the earlier indices of the layers."""

    def before(name: str) -> str:
        head, _, rest = name.partition(".")
        index, _, kind = rest.partition(".")
        return f"layers.{layers[int(index)]}.{kind}" if head == "layers" else name

    return {before(name): value for name, value in removed.items()}


def together(first: Mapping[str, Removed], then: Mapping[str, Removed]) -> dict[str, Removed]:
    """Returns the removal record of two consecutive prunings, both with the group names of the first model."""
    late = {name: value.importance for name, value in then.items()}
    return {name: Removed(value.units, value.importance + late.get(name, 0.0)) for name, value in first.items()}


def in_all(provenance: Provenance | None) -> dict[str, tuple[int, float]]:
    """Returns, by the pruned model's group names, the original number of units and the importance removed by all prunings.

    The result is empty if there was no pruning, or if one of them has no record.
    """
    found: dict[str, tuple[int, float]] = {}
    for plan in _plans(provenance):
        if not plan.removed:
            return {}
        whole = {cut.group.removesuffix(".layer") for cut in plan.cuts if cut.group.endswith(".layer") and not cut.kept}
        layers = sorted({_layer(name) for name in plan.removed if name.startswith("layers.")})
        stay = [layer for layer in layers if f"layers.{layer}" not in whole]
        now: dict[str, tuple[int, float]] = {}
        for name, value in plan.removed.items():
            units, before = found.get(name, (value.units, 0.0))
            if not name.startswith("layers."):
                now[name] = (units, before + value.importance)
            elif _layer(name) in stay:
                kind = name.split(".", 2)[2]
                now[f"layers.{stay.index(_layer(name))}.{kind}"] = (units, before + value.importance)
        found = now
    return found


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _plans(provenance: Provenance | None) -> list[PrunePlan]:
    if provenance is None:
        return []
    earlier = [from_json(Provenance, to_json(parent)) for parent in provenance.parents]
    return [record.plan for record in (*earlier, provenance) if record.plan is not None]
