"""A plan in a few lines: the sizes before and after, equal layers in one row, and why a kind of unit loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.plans import WHOLE, Group, GroupKind, Groups, PrunePlan
from regraft.selection.uniform import FINEST_FIRST

WORDS: dict[GroupKind, str] = {
    "heads": "key-value heads",
    "query_heads": "query heads",
    "mixer_heads": "heads of mixers",
    "ffn": "feed-forward channels",
    "residual": "the residual width",
    "layer": "layers",
    "attention": "attention",
    "mlp": "feed-forward networks",
    "vocabulary": "tokens",
    "experts": "experts",
    "expert_ffn": "channels of experts",
}


def plan_summary(groups: Groups, plan: PrunePlan) -> list[dict[str, Any]]:
    """Returns one row for each group: its name, kind, units before and units after. All experts of a layer are one row."""
    kept = {entry.group: len(entry.kept) for entry in plan.cuts}
    rows: dict[str, dict[str, Any]] = {}
    for group in groups.groups:
        name = f"layers.{group.layer}.expert_ffn" if group.kind == "expert_ffn" else group.name
        rows.setdefault(name, {"group": name, "kind": group.kind, "before": group.units, "after": kept.get(group.name, group.units)})
    return list(rows.values())


def collapsed(rows: tuple[dict[str, Any], ...] | list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Returns the rows of a plan's summary with neighbouring layers of equal sizes in one: names, units before, units after.

    >>> row = {"kind": "ffn", "before": 64, "after": 48}
    >>> collapsed([row | {"group": "layers.0.ffn"}, row | {"group": "layers.1.ffn"}, row | {"group": "layers.2.ffn", "after": 32}])
    [('layers.0-1.ffn', 64, 48), ('layers.2.ffn', 64, 32)]
    """
    runs: list[tuple[str, int, int, str, int, int]] = []  # kind, first layer, last layer, rest of the name, before, after
    whole: list[tuple[str, int, int]] = []
    for row in sorted(rows, key=lambda row: row["kind"]):
        head, _, rest = row["group"].partition(".")
        number, _, rest = rest.partition(".")
        if head != "layers" or not number.isdigit():
            whole.append((row["group"], row["before"], row["after"]))
            continue
        layer = int(number)
        last = runs[-1] if runs else None
        if last is not None and (last[0], last[2] + 1, *last[3:]) == (row["kind"], layer, rest, row["before"], row["after"]):
            runs[-1] = (last[0], last[1], layer, *last[3:])
        else:
            runs.append((row["kind"], layer, layer, rest, row["before"], row["after"]))
    named = [(f"layers.{first}{f'-{last}' if last > first else ''}.{rest}", before, after) for _, first, last, rest, before, after in runs]
    return [*named, *whole]


def why_kept(groups: Groups, plan: PrunePlan) -> tuple[str, ...]:
    """Returns a line for each kind of unit that could be cut and is not, with the reason."""
    named = groups.named()
    cut = {named[entry.group].kind for entry in plan.cuts}
    others = " and ".join(words for kind, words in WORDS.items() if kind in cut)
    return tuple(f"{WORDS[kind]} stay: {_reason(kind, groups, plan, others)}" for kind in WORDS if groups.of(kind) and kind not in cut)


def _reason(kind: GroupKind, groups: Groups, plan: PrunePlan, others: str) -> str:
    here = groups.of(kind)
    if kind not in WHOLE and all(group.units == 1 for group in here):
        return "every layer has one, and keeps it"
    least = _least(here, plan) / groups.parameters
    if least > plan.ratio:
        every = " of every layer" if plan.shape == "uniform" and kind not in (*WHOLE, "residual") else ""
        return f"the smallest step{every} is {least:.1%} of the parameters, more than was asked for"
    finest = next(other for other in FINEST_FIRST if groups.of(other))
    return {
        "knapsack": f"to cut {others} moves the predictions less, by measured damage",
        "global": f"{others} score lower for their parameters",
        "uniform": f"{others} meet the ratio alone" if kind == finest else "their share is less than one unit",
    }.get(plan.selection, f"selection {plan.selection} chose {others}")


def _least(here: Sequence[Group], plan: PrunePlan) -> float:
    """Returns the parameters of the smallest step in a kind of unit: in all layers for the shape ``uniform``, else in one."""
    steps = [group.unit_parameters * (plan.align if group.kind in ("ffn", "residual") else 1) for group in here]
    return float(sum(steps) if plan.shape == "uniform" and here[0].kind not in WHOLE else min(steps))
