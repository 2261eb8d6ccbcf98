"""Prune a model: discover what is coupled, score it, choose what stays, cut, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from regraft.atomic import refuse_existing
from regraft.data.text import read_corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import InputError
from regraft.groups.declared import discover
from regraft.importance import CRITERIA, Evidence, score
from regraft.models.card import model_card
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.provenance import parents_of, versions
from regraft.models.save import save
from regraft.models.view import ModelView
from regraft.plans import Cut, Groups, Provenance, PrunePlan, to_dict
from regraft.selection import SELECTORS, Budget, select
from regraft.selection.budget import check_possible
from regraft.settings import CALIBRATION_TOKENS, LoadSettings, PruneSettings
from regraft.surgery.compensate import Method, compensate
from regraft.surgery.cut import check_plan, cut
from regraft.surgery.damage import measure_curves


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
    say: Callable[[str], None] = lambda line: None,
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
        say: Called with one line now and then, for the impatient.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    settings = settings or PruneSettings()
    if output is not None and not dry_run:
        refuse_existing(Path(output))
    loaded = load(source, load_settings or LoadSettings())
    groups = discover(ModelView(loaded.model))
    plan = plan_pruning(loaded, groups, settings, seed, say)
    if dry_run:
        return PruneResult(plan, None, loaded)
    model = cut_to_plan(loaded, groups, plan, settings, seed)
    if output is not None:
        save_pruned(model, loaded, plan, Path(output), settings, seed=seed, command=command)
    return PruneResult(plan, model, loaded)


def plan_pruning(
    loaded: Loaded, groups: Groups, settings: PruneSettings, seed: int, say: Callable[[str], None] = lambda line: None
) -> PrunePlan:
    """Scores the groups of a loaded model and chooses what stays; the model is left as it is.

    With several rounds each one scores and cuts what the rounds before have left, towards an equal share of what remains to go.

    Raises:
        InputError: A name is unknown or the ratio cannot be met.
        DataError: The calibration text cannot be used.
    """
    way = resolve(settings)
    budget = _budget(groups, settings)
    windows = _windows(loaded, settings, seed) if way.needs_text else None
    view, current, plan = ModelView(loaded.model), groups, None
    for step in range(1, settings.rounds + 1):
        done = plan.achieved if plan is not None else 0.0
        wanted = done + (settings.ratio - done) / (settings.rounds - step + 1)
        share = (wanted - done) / (1.0 - done)
        found = _plan_once(view, current, windows, settings, way, replace(budget, ratio=share), seed, say)
        plan = found if plan is None else composed(groups, plan, found)
        if step < settings.rounds:
            model = _cut(ModelView(loaded.model), groups, plan, windows, way)
            view = ModelView(model)
            current = discover(view)
    assert plan is not None
    return replace(plan, ratio=settings.ratio)


def cut_to_plan(loaded: Loaded, groups: Groups, plan: PrunePlan, settings: PruneSettings, seed: int) -> PreTrainedModel:
    """Returns the pruned model: what reads the pruned channels is re-fitted, then everything is cut.

    Raises:
        PlanError: The plan does not fit the model.
    """
    check_plan(groups, plan)
    way = resolve(settings)
    windows = _windows(loaded, settings, seed) if way.reconstruct is not None else None
    return _cut(ModelView(loaded.model), groups, plan, windows, way)


@dataclass(frozen=True)
class Way:
    """The settings that say "auto", decided.

    Attributes:
        select: A registered selector.
        reconstruct: How reading projections are re-fitted, or None.
        needs_text: Whether any of it needs calibration text.
    """

    select: str
    reconstruct: Method | None
    needs_text: bool


def resolve(settings: PruneSettings) -> Way:
    """Decides what "auto" means: criteria without text stay without text, everything else takes the best there is.

    Raises:
        InputError: The criterion is unknown, or the budget needs a selector that was not chosen.
    """
    with_text = CRITERIA.get(settings.criterion).needs_text
    plain = "uniform" if settings.shape == "uniform" else "global"
    curves_wanted = settings.budget != "parameters"
    chosen = settings.select
    if chosen == "auto":
        chosen = "knapsack" if with_text or curves_wanted else plain
    if curves_wanted and chosen != "knapsack":
        raise InputError(f"--budget {settings.budget} is only known to the knapsack; use --select knapsack (now {chosen})")
    method = settings.reconstruct
    if method == "auto":
        method = "least_squares" if with_text else "none"
    reconstruct: Method | None = None if method == "none" else method
    return Way(chosen, reconstruct, with_text or chosen == "knapsack" or reconstruct is not None)


def composed(groups: Groups, first: PrunePlan, then: PrunePlan) -> PrunePlan:
    """Returns one plan on the first model for two plans in a row, the second made on what the first left."""
    kept = {entry.group: entry.kept for entry in first.cuts}
    for entry in then.cuts:
        before = kept.get(entry.group, tuple(range(groups.named()[entry.group].units)))
        kept[entry.group] = tuple(before[unit] for unit in entry.kept)
    cuts = tuple(Cut(group.name, kept[group.name]) for group in groups.groups if group.name in kept)
    return replace(first, parameters_after=then.parameters_after, cuts=cuts, align=then.align)


def _budget(groups: Groups, settings: PruneSettings) -> Budget:
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
    return budget


def _plan_once(
    view: ModelView,
    groups: Groups,
    windows: Tensor | None,
    settings: PruneSettings,
    way: Way,
    budget: Budget,
    seed: int,
    say: Callable[[str], None],
) -> PrunePlan:
    evidence = Evidence(
        model=view.model,
        groups=groups,
        windows=windows if CRITERIA.get(settings.criterion).needs_text else None,
        seed=seed,
        order=settings.order,
        granularity=settings.granularity,
        reduce=settings.reduce,
    )
    if budget.ratio * groups.parameters > sum(group.units * group.unit_parameters for group in budget.prunable(groups)):
        check_possible(groups, budget)
    scores = score(settings.criterion, evidence)
    if SELECTORS.get(way.select).needs_curves:
        assert windows is not None
        names = [group.name for group in budget.prunable(groups)]
        curves = measure_curves(view, groups, scores, windows, only=names, unit=settings.budget, say=say)
        budget = replace(budget, curves=curves)
    return select(way.select, groups, scores, budget, auto_align=settings.align == "auto")


def _cut(view: ModelView, groups: Groups, plan: PrunePlan, windows: Tensor | None, way: Way) -> PreTrainedModel:
    changed: dict[str, Tensor] = {}
    if way.reconstruct is not None:
        assert windows is not None
        changed = compensate(view, groups, plan.cuts, windows, way.reconstruct)
    return cut(view.model, groups, plan, changed)


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
    seq_len = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "--seq-len")
    corpus = read_corpus(settings.calibration, "validation")
    return calibration_windows(corpus, require_tokenizer(loaded), settings.samples, seq_len, seed)
