"""The record and the model card of a compressed model's folder, its ranks in a few rows, and the last check of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.compression import Decomposed
from regraft.errors import InputError
from regraft.models.card import model_card
from regraft.models.load import Loaded
from regraft.models.provenance import parents_of, versions
from regraft.plans import FactorPlan, Provenance, PrunePlan
from regraft.settings import CompressSettings


def record_of(
    loaded: Loaded, plan: FactorPlan, settings: CompressSettings, *, seed: int, command: str, pruning: PrunePlan | None = None
) -> Provenance:
    """Returns how a compressed model came to be, without the checksums of its files; ``pruning`` are the channels that went first."""
    return Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=seed,
        versions=versions(),
        plan=pruning,
        factors=plan,
        settings={"compress": settings.decisive()},
        parents=parents_of(loaded.provenance),
    )


def card_of(record: Provenance, *, dense: bool) -> str:
    """Returns the start of a compressed model's card."""
    rows = facts(record.factors, dense=dense) if record.factors is not None else {}
    if record.plan is not None:
        rows = {"channels removed first": f"{record.plan.achieved:.2%} of all parameters, {record.plan.criterion}", **rows}
    return model_card(record, rows)


def facts(plan: FactorPlan, *, dense: bool) -> dict[str, Any]:
    """Returns the facts on a plan that its model card shows, in words."""
    found = {
        "stored parameters before": f"{plan.parameters_before:,}",
        "stored parameters after": f"{plan.parameters_after:,}",
        "share removed": f"{plan.achieved:.2%} of all stored parameters (asked for: {plan.ratio:.2%})",
        "method": f"{plan.method}, ranks by {plan.choice}, {plan.layout} layout, {len(plan.factorings)} layers factored",
        "speed": "a smaller file; faster only where measured",
    }
    if dense:
        found["stored parameters after"] = f"{plan.parameters_before:,} and new biases: written dense for runtimes that know no factors"
    return found


def rank_rows(plan: FactorPlan) -> list[dict[str, Any]]:
    """Returns one row for each kind of factored projection: its name, how many there are, and their rank or ranks in words."""
    ranks: dict[str, list[int]] = {}
    for entry in plan.factorings:
        ranks.setdefault(entry.module.rpartition(".")[2], []).append(entry.rank)
    return [
        {"projection": kind, "factored": len(found), "ranks": str(found[0]) if len(set(found)) == 1 else f"{min(found)} to {max(found)}"}
        for kind, found in ranks.items()
    ]


def refuse_short_text(plan: FactorPlan, found: Sequence[Decomposed]) -> None:
    """Refuses calibration text with fewer tokens than a factored layer has directions.

    Raises:
        InputError: It is too short for a rank.
    """
    seen = {one.priced.name: one.rows_seen for one in found if one.rows_seen}
    for entry in plan.factorings:
        if entry.module in seen and seen[entry.module] < entry.rank:
            raise InputError(
                f"{seen[entry.module]} calibration tokens cannot tell {entry.rank} directions of '{entry.module}' apart; "
                "give more samples, a longer seq_len, or a larger ratio"
            )
