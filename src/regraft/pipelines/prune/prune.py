"""Prune a model: discover what is coupled, score it, choose what stays, cut, save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from regraft.atomic import reserved
from regraft.errors import InputError
from regraft.groups.discover import discover, look_for
from regraft.models.load import Loaded
from regraft.models.load import load as load_model
from regraft.models.save import save
from regraft.models.view import ModelView
from regraft.pipelines.prune.plan_files import settings_of
from regraft.pipelines.prune.planning import (
    Planning,
    Say,
    Way,
    budget_of,
    calibration,
    check_text,
    composed,
    kinds_wanted,
    layers_in,
    left_out,
    reconstruct_of,
    resolve,
)
from regraft.pipelines.prune.record import card_of, facts, record_of
from regraft.pipelines.prune.streamed import Request, prune_streamed
from regraft.plans import Groups, Provenance, PrunePlan, to_dict
from regraft.settings import LoadSettings, PruneSettings
from regraft.surgery.apply_plan import apply_plan
from regraft.surgery.cut import check_counts, check_plan, cut, layers_after
from regraft.surgery.refit_predictions import refit_to_predictions

__all__ = [
    "PruneResult",
    "cut_to_plan",
    "facts",
    "kinds_wanted",
    "layers_in",
    "plan_dict",
    "plan_pruning",
    "plan_summary",
    "prune",
    "replay",
    "resolve",
    "save_pruned",
]


@dataclass(frozen=True)
class PruneResult:
    """What pruning gave.

    Attributes:
        plan: Which units stay.
        model: The pruned model; None after a dry run, and where a bound of memory kept it on disk.
        loaded: The model before, with its tokenizer and source; without its weights under a bound of memory.
        groups: Of the model before: what could be cut.
        notes: What the user should know, a line each.
    """

    plan: PrunePlan
    model: PreTrainedModel | None
    loaded: Loaded
    groups: Groups
    notes: tuple[str, ...] = ()


def prune(
    source: str | Path,
    output: str | Path | None = None,
    settings: PruneSettings | None = None,
    *,
    load: LoadSettings | None = None,
    seed: int = 0,
    dry_run: bool = False,
    command: str = "regraft.prune",
    say: Say = lambda line: None,
) -> PruneResult:
    """Prunes a model to a share of all its parameters.

    Args:
        source: A folder, a hub id, or ``seedling``.
        output: Where the pruned model is saved; None keeps it in memory.
        settings: What is cut and how it is chosen. With ``memory`` the model is read, pruned and written layer by layer.
        load: How the model is loaded.
        seed: Of the calibration windows and of random scores.
        dry_run: Plan only: nothing is cut and nothing is written.
        command: How this was called, for the folder's record.
        say: Called with one line now and then, for the impatient.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    settings = settings or PruneSettings()
    request = Request(source, _path(output), settings, resolve(settings), load or LoadSettings(), seed, None, command, say)
    return _carry_out(request, dry_run=dry_run)


def replay(
    source: str | Path,
    plan: PrunePlan,
    output: str | Path | None = None,
    settings: PruneSettings | None = None,
    *,
    load: LoadSettings | None = None,
    seed: int = 0,
    dry_run: bool = False,
    command: str = "regraft.replay",
    say: Say = lambda line: None,
) -> PruneResult:
    """Prunes a model to a plan that was made before; the weights are those of the run that the plan is of, byte by byte.

    Args:
        source: The model that the plan was made for.
        plan: What stays. It brings the settings and the seed that it was made with.
        output: Where the pruned model is saved; None keeps it in memory.
        settings: Memory, cache and where the calibration text lies now; everything else for plans that bring no settings.
        load: How the model is loaded.
        seed: For plans that bring none.
        dry_run: Look only: nothing is cut and nothing is written.
        command: How this was called, for the folder's record.
        say: Called with one line now and then.

    Raises:
        RegraftError: Anything that the user can mend, in one line: the plan is of another model, or the calibration text is another.
    """
    own, own_seed = settings_of(plan, settings or PruneSettings())
    # Nothing is chosen any more, but how the projections are re-fitted.
    way = replace(resolve(own.model_copy(update={"memory": None})), reconstruct=reconstruct_of(own))
    if own_seed is not None and seed not in (0, own_seed):
        raise InputError(f"--seed {seed} does nothing beside --plan, which was made with {own_seed}; leave it out, or plan anew")
    seed = seed if own_seed is None else own_seed
    request = Request(source, _path(output), own, way, load or LoadSettings(), seed, plan, command, say)
    return _carry_out(request, dry_run=dry_run)


def _path(output: str | Path | None) -> Path | None:
    return None if output is None else Path(output)


def _carry_out(request: Request, *, dry_run: bool) -> PruneResult:
    with reserved(None if dry_run else request.output):
        if request.settings.memory is None:
            return _carry_out_in_memory(request, dry_run=dry_run)
        if request.output is None and not dry_run:
            raise InputError("--memory keeps the pruned model on disk; say where with --output")
        done = prune_streamed(replace(_decided(request), output=None if dry_run else request.output))
        return PruneResult(done.plan, None, done.loaded, done.groups, done.notes)


def _carry_out_in_memory(request: Request, *, dry_run: bool) -> PruneResult:
    settings, output, say = request.settings, request.output, request.say
    loaded = load_model(request.source, request.load)
    if request.plan is None:
        request = replace(request, way=resolve(settings, ModelView(loaded.model)))
    settings = _decided(request).settings
    found = look_for(loaded.model, kinds_wanted(settings, request.plan))
    groups = found.groups
    plan = request.plan or plan_pruning(loaded, groups, settings, request.seed, say)
    check_plan(groups, plan)
    check_counts(groups, plan)
    notes = (*request.way.notes, *left_out(settings, found)) if request.plan is None else ()
    if dry_run:
        return PruneResult(plan, None, loaded, groups, notes)
    model = cut_to_plan(loaded, groups, plan, settings, request.seed, say)
    if output is not None:
        save_pruned(model, loaded, plan, output, settings, seed=request.seed, command=request.command)
    return PruneResult(plan, model, loaded, groups, notes)


def _decided(request: Request) -> Request:
    """Writes into the settings how it is re-fitted: "auto" depends on --memory and on the model, a record is replayed elsewhere."""
    return replace(request, settings=request.settings.model_copy(update={"reconstruct": request.way.reconstruct or "none"}))


def plan_pruning(loaded: Loaded, groups: Groups, settings: PruneSettings, seed: int, say: Say = lambda line: None) -> PrunePlan:
    """Scores the groups of a loaded model and chooses what stays; the model is left as it is.

    With several rounds each one scores and cuts what the rounds before have left, towards an equal share of what remains to go.

    Raises:
        InputError: A name is unknown or the ratio cannot be met.
        DataError: The calibration text cannot be used.
    """
    way = resolve(settings, ModelView(loaded.model))
    if settings.memory is not None:
        raise InputError("--memory is for models that are not loaded; leave it out here")
    budget = budget_of(groups, settings)
    windows = calibration(loaded, settings, seed) if way.needs_text else None
    planning = Planning(settings, way, windows, seed, say)
    view, current, plan = ModelView(loaded.model), groups, None
    for step in range(1, settings.rounds + 1):
        done = plan.achieved if plan is not None else 0.0
        wanted = done + (settings.ratio - done) / (settings.rounds - step + 1)
        share = (wanted - done) / (1.0 - done)
        found = planning.once(view, current, replace(budget, ratio=share))
        plan = found if plan is None else composed(groups, plan, found)
        if step < settings.rounds:
            model = _cut(ModelView(loaded.model), groups, plan, windows, way)
            view = ModelView(model)
            current = discover(view, kinds_wanted(settings))
            stay = enumerate(layers_after(groups, plan.cuts))
            budget = replace(budget, layers=tuple(new for new, old in stay if old in layers_in(settings.layers, groups.layers)))
    assert plan is not None
    return replace(plan, ratio=settings.ratio, made_with=planning.made_with())


def cut_to_plan(
    loaded: Loaded, groups: Groups, plan: PrunePlan, settings: PruneSettings, seed: int, say: Say = lambda line: None
) -> PreTrainedModel:
    """Returns the pruned model: what reads the pruned channels is re-fitted, then everything is cut.

    Raises:
        PlanError: The plan does not fit the model, or was made with other calibration text than the settings name.
    """
    check_plan(groups, plan)
    way = resolve(settings, ModelView(loaded.model))
    windows = calibration(loaded, settings, seed) if way.reconstruct is not None else None
    check_text(plan, windows)
    model = _cut(ModelView(loaded.model), groups, plan, windows, way)
    if way.reconstruct == "divergence":
        assert windows is not None
        refit_to_predictions(ModelView(model), loaded.model, windows, seed=seed, say=say)
    return model


def _cut(view: ModelView, groups: Groups, plan: PrunePlan, windows: Tensor | None, way: Way) -> PreTrainedModel:
    if way.reconstruct is None:
        return cut(view.model, groups, plan)
    assert windows is not None
    return apply_plan(view, groups, plan, windows, "least_squares" if way.reconstruct == "divergence" else way.reconstruct)


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
    record = record_of(loaded, plan, settings, seed=seed, command=command)
    return save(model, loaded.tokenizer, output, record, card_of(record), replace=replace)


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
