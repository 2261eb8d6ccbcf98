"""Record of a pruned model's folder: provenance and model card."""

from __future__ import annotations

from typing import Any

from regraft.models.card import model_card
from regraft.models.load import Loaded
from regraft.models.provenance import parents_of, versions
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.plans import Provenance, PrunePlan


def record_of(loaded: Loaded, plan: PrunePlan, resolved: ResolvedPrune, *, command: str) -> Provenance:
    """Returns the provenance of a pruned model, without the checksums of its files.

    Args:
        loaded: The model before.
        plan: What stays.
        resolved: How it was pruned.
        command: The command or call that made it.
    """
    return Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=resolved.seed,
        versions=versions(),
        plan=plan,
        settings={"prune": resolved.record(plan)},
        parents=parents_of(loaded.provenance),
    )


def card_of(record: Provenance) -> str:
    """Returns the beginning of a pruned model's card."""
    return model_card(record, facts(record.plan) if record.plan is not None else {})


def facts(plan: PrunePlan) -> dict[str, Any]:
    """Returns the facts about a plan for a model card, in words."""
    return {
        "parameters before": f"{plan.parameters_before:,}",
        "parameters after": f"{plan.parameters_after:,}",
        "share removed": f"{plan.achieved:.2%} of all parameters (asked for: {plan.ratio:.2%})",
        "criterion": plan.criterion,
        "selection": f"{plan.selection}, {plan.shape}, widths aligned to {plan.align}",
    }
