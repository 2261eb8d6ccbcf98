"""Prune a model: discover what is coupled, score it, choose what stays, cut, save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from regraft.data.text import read_corpus
from regraft.data.tokens import calibration_windows, context_limit
from regraft.models.card import model_card
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.provenance import parents_of, versions
from regraft.models.save import save
from torch import Tensor
from transformers import PreTrainedModel

from regraft.atomic import refuse_existing
from regraft.errors import InputError
from regraft.groups.declared import discover
from regraft.importance import CRITERIA, Evidence, score
from regraft.models.view import ModelView
from regraft.plans import Groups, Provenance, PrunePlan, to_dict
from regraft.selection import Budget, select
from regraft.settings import LoadSettings, PruneSettings
from regraft.surgery.cut import cut


@dataclass(frozen=True)
class PruneResult:
    """What pruning gave.

    Attributes:
        plan: Which units stay.
        model: The pruned model, or None after a dry run.
        loaded: The model before, with its tokenizer and source.
    """

    plan: PrunePlan
    model: PreTrainedModel | None
    loaded: Loaded


def prune(
    source: str | Path,
    output: Path | None = None,
    settings: PruneSettings | None = None,
    *,
    load_settings: LoadSettings | None = None,
    seed: int = 0,
    dry_run: bool = False,
    command: str = "regraft.prune",
) -> PruneResult:
    """Prunes a model to a share of all its parameters.

    Args:
        source: A folder, a hub id, or ``seedling``.
        output: Where the pruned model is saved; None keeps it in memory.
        settings: What is cut and how it is chosen.
        load_settings: How the model is loaded.
        seed: Of the calibration windows and of random scores.
        dry_run: Plan only: nothing is cut and nothing is written.
        command: How this was called, for the folder's record.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    settings = settings or PruneSettings()
    if output is not None and not dry_run:
        refuse_existing(Path(output))
    loaded = load(source, load_settings or LoadSettings())
    groups = discover(ModelView(loaded.model))
    plan = plan_pruning(loaded, groups, settings, seed)
    if dry_run:
        return PruneResult(plan, None, loaded)
    model = cut(loaded.model, groups, plan)
    if output is not None:
        save_pruned(model, loaded, plan, Path(output), settings, seed=seed, command=command)
    return PruneResult(plan, model, loaded)


def plan_pruning(loaded: Loaded, groups: Groups, settings: PruneSettings, seed: int) -> PrunePlan:
    """Scores the groups of a loaded model and chooses what stays.

    Raises:
        InputError: A name is unknown or the ratio cannot be met.
        DataError: The calibration text cannot be used.
    """
    budget = Budget(
        ratio=settings.ratio,
        shape=settings.shape,
        layers=layers_in(settings.layers, groups.layers),
        targets=settings.targets,
        align=settings.align if isinstance(settings.align, int) else 1,
    )
    if settings.shape == "uniform" and len(budget.layers) < groups.layers:
        raise InputError(
            f"--shape uniform wants the same width in all {groups.layers} layers, but --layers {settings.layers} prunes only "
            f"{len(budget.layers)}; drop --layers or use --shape per-layer"
        )
    criterion = CRITERIA.get(settings.criterion)
    scores = score(
        settings.criterion,
        Evidence(
            model=loaded.model,
            groups=groups,
            windows=_windows(loaded, settings, seed) if criterion.needs_text else None,
            seed=seed,
            order=settings.order,
            granularity=settings.granularity,
            reduce=settings.reduce,
        ),
    )
    selector = "uniform" if settings.shape == "uniform" else "global"
    return select(selector, groups, scores, budget, auto_align=settings.align == "auto")


def layers_in(text: str, count: int) -> tuple[int, ...]:
    """Returns the layer indices of a range written as a Python slice.

    Raises:
        InputError: The range is empty.

    >>> layers_in("1:-1", 4)
    (1, 2)
    """
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    chosen = tuple(range(count)[slice(*parts)])
    if not chosen:
        raise InputError(f"--layers {text} names no layer of this model's {count}; write START:STOP, such as 1:-1")
    return tuple(sorted(chosen))


def save_pruned(
    model: PreTrainedModel,
    loaded: Loaded,
    plan: PrunePlan,
    output: Path,
    settings: PruneSettings,
    *,
    seed: int,
    command: str,
    replace: bool = False,
) -> Provenance:
    """Saves a pruned model with its plan, its card and how it came to be."""
    provenance = Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=seed,
        versions=versions(),
        plan=plan,
        settings={"prune": settings.model_dump(mode="json")},
        parents=parents_of(loaded.provenance),
    )
    return save(model, loaded.tokenizer, output, provenance, model_card(provenance, facts(plan)), replace=replace)


def facts(plan: PrunePlan) -> dict[str, Any]:
    """Returns what a reader of a model card wants to know of a plan, in words."""
    return {
        "parameters before": f"{plan.parameters_before:,}",
        "parameters after": f"{plan.parameters_after:,}",
        "share removed": f"{plan.achieved:.2%} of all parameters (asked for: {plan.ratio:.2%})",
        "criterion": plan.criterion,
        "selection": f"{plan.selection}, {plan.shape}, widths aligned to {plan.align}",
    }


def plan_summary(groups: Groups, plan: PrunePlan) -> list[dict[str, Any]]:
    """Returns one row for each group: its name, kind, units before and units after."""
    kept = {entry.group: len(entry.kept) for entry in plan.cuts}
    return [
        {"group": group.name, "kind": group.kind, "before": group.units, "after": kept.get(group.name, group.units)}
        for group in groups.groups
    ]


def plan_dict(plan: PrunePlan) -> dict[str, Any]:
    """Returns a plan as plain JSON types, with the share that it achieves."""
    return to_dict(plan) | {"achieved": plan.achieved}


def _windows(loaded: Loaded, settings: PruneSettings, seed: int) -> Tensor:
    limit = context_limit(loaded.model.config)
    if limit is not None and settings.seq_len > limit:
        raise InputError(f"--seq-len {settings.seq_len} exceeds the model's context of {limit} tokens; use at most {limit}")
    corpus = read_corpus(settings.calibration, "validation")
    tokenizer = require_tokenizer(loaded)
    windows = calibration_windows(corpus, tokenizer, settings.samples, settings.seq_len, seed)
    assert windows.dtype == torch.int64
    return windows
