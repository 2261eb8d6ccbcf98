"""Pruning of a model: discover groups, score units, choose the units to keep, cut, save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.atomic import reserved
from regraft.data.text import Corpus
from regraft.errors import InputError
from regraft.groups.discover import discover, look_for
from regraft.importance.passes import WholeModel
from regraft.models.live import ModelLike, become, own_tensors, place_of, remember, resting, take
from regraft.models.load import Loaded, require_tokenizer, with_float64
from regraft.models.towers import left_behind, load_tower, save_inside
from regraft.models.view import ModelView
from regraft.pipelines.prune.against_random import BASELINE, Chosen, windows_to_judge, worse_than_random
from regraft.pipelines.prune.effort import EFFORTS, forecast
from regraft.pipelines.prune.experts import experts_wanted, of_experts, plan_experts, resolved_for_experts
from regraft.pipelines.prune.plan_files import settings_of
from regraft.pipelines.prune.planning import Planning, check_text, composed, draw_windows
from regraft.pipelines.prune.priced_tokens import PricedTokens, priced_tokens, with_tokens, within_layers, without_tokens
from regraft.pipelines.prune.record import card_of, record_of
from regraft.pipelines.prune.resolved import (
    ResolvedPrune,
    budget_of,
    kinds_wanted,
    layers_in,
    left_out,
    missed_by_shape,
    only_wanted,
    refuse_unlike_layers,
    resolve,
    resolve_replay,
    with_shape,
)
from regraft.pipelines.prune.result import PruneResult
from regraft.pipelines.prune.sources import by_source, check_own_text, counted_texts, drawn_windows, refuse_several
from regraft.pipelines.prune.streamed import StreamedPrune, prune_streamed
from regraft.pipelines.prune.vocabulary import of_vocabulary, prune_vocabulary
from regraft.pipelines.texts import Texts, described, in_memory, path_in, text_for
from regraft.plans import Groups, PrunePlan
from regraft.progress import Say, say_nothing
from regraft.settings import LoadSettings, PruneSettings, takes_settings, with_keywords
from regraft.surgery.apply_plan import apply_plan
from regraft.surgery.cut import check_counts, check_plan, cut, layers_after
from regraft.surgery.experts import cut_experts
from regraft.surgery.refit_predictions import refit_to_predictions
from regraft.surgery.vocabulary import VOCABULARY


@takes_settings(PruneSettings, LoadSettings)
def prune(
    model: ModelLike,
    output: str | Path | None = None,
    settings: PruneSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Texts | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    in_place: bool = False,
    dry_run: bool = False,
    command: str = "regraft.prune",
    say: Say = say_nothing,
    **keywords: Any,
) -> PruneResult:
    """Prunes a model to a share of all its parameters.

    Args:
        model: A ``PreTrainedModel`` in memory, which is left as it is; or a folder, a hub id, or ``seedling``.
        output: Where the pruned model is saved; None writes nothing.
        settings: What is cut and how it is chosen. With ``memory`` the model is read, pruned and written layer by layer.
        tokenizer: The tokenizer for a model in memory.
        calibration: Text like that which the model is to work on: a file, texts, or a data set with a column ``text``.
        load: How a folder or hub id is loaded.
        seed: Seed for the calibration windows and for random scores.
        in_place: Whether a model in memory becomes the pruned one.
        dry_run: Plan only: nothing is cut and nothing is written.
        command: How this was called, for the folder's record.
        say: Called with a line of progress at each step.
        **keywords: Single settings by name, such as ``ratio=0.2``; they count before those in ``settings`` and ``load``.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    chosen, load = with_keywords(command, keywords, settings or PruneSettings(), load or LoadSettings())
    chosen, texts = _with_text(chosen, calibration)
    return _carry_out(_Order(model, tokenizer, texts, _path(output), chosen, load, seed, in_place, dry_run, None, command, say))


@takes_settings(PruneSettings, LoadSettings, plan=PrunePlan)
def replay(
    model: ModelLike,
    plan: PrunePlan,
    output: str | Path | None = None,
    settings: PruneSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Texts | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    in_place: bool = False,
    dry_run: bool = False,
    command: str = "regraft.replay",
    say: Say = say_nothing,
    **keywords: Any,
) -> PruneResult:
    """Prunes a model by an existing plan; the weights equal those of the plan's run, byte by byte.

    Args:
        model: The model that the plan was made for.
        plan: What stays. It brings the settings and the seed that it was made with.
        output: Where the pruned model is saved; None writes nothing.
        settings: Memory, cache and where the calibration text lies now; everything else for plans that bring no settings.
        tokenizer: The tokenizer for a model in memory.
        calibration: The text that the plan was made with, where it lies elsewhere now.
        load: How a folder or hub id is loaded.
        seed: Seed for plans that bring none.
        in_place: Whether a model in memory becomes the pruned one.
        dry_run: Look only: nothing is cut and nothing is written.
        command: How this was called, for the folder's record.
        say: Called with a line of progress at each step.
        **keywords: Single settings by name.

    Raises:
        RegraftError: Anything that the user can mend, in one line: the plan is of another model, or the calibration text is another.
    """
    chosen, load = with_keywords(command, keywords, settings or PruneSettings(), load or LoadSettings())
    own, own_seed = settings_of(plan, chosen)
    if own_seed is not None and seed not in (0, own_seed):
        raise InputError(f"`seed={seed}` does nothing beside `plan`, which was made with {own_seed}; leave it out, or plan anew")
    seed = seed if own_seed is None else own_seed
    own, texts = _with_text(own, calibration)
    return _carry_out(_Order(model, tokenizer, texts, _path(output), own, load, seed, in_place, dry_run, plan, command, say))


@dataclass(frozen=True)
class _Order:
    """The parameters of a call of :func:`prune` or :func:`replay`."""

    model: ModelLike
    tokenizer: PreTrainedTokenizerBase | None
    calibration: Texts | None
    output: Path | None
    settings: PruneSettings
    load: LoadSettings
    seed: int
    in_place: bool
    dry_run: bool
    plan: PrunePlan | None
    command: str
    say: Say
    checkpoint: str | Path | None = None  # where a tower was taken from

    def resolved(self, view: ModelView | None = None) -> ResolvedPrune:
        return (resolve if self.plan is None else resolve_replay)(self.settings, view, self.seed)

    def text(self, loaded: Loaded) -> Corpus:
        given = self.calibration if self.calibration is not None else self.settings.calibration
        return text_for(loaded, given, "validation", "calibration")


def _with_text(settings: PruneSettings, calibration: Texts | None) -> tuple[PruneSettings, Texts | None]:
    """Returns the settings with the path of a file of text, and separately text that is in memory."""
    if calibration is None:
        return settings, None
    return settings.model_copy(update={"calibration": path_in(calibration)}), in_memory(calibration)


def _path(output: str | Path | None) -> Path | None:
    return None if output is None else Path(output)


def _carry_out(order: _Order) -> PruneResult:
    result = _pruned(order)
    if result.model is not None:
        remember(result.model, result.provenance)
    return result


def _pruned(order: _Order) -> PruneResult:
    with reserved(None if order.dry_run else order.output):
        order = _with_tower(order)
        if of_vocabulary(order.settings):
            return _vocabulary(order)
        if of_experts(order.settings):
            return _experts(order) if order.settings.memory is None else _streamed(order, resolved_for_experts(order.settings, order.seed))
        resolved = order.resolved()  # what cannot be is refused before a model is loaded
        order = replace(order, load=with_float64(order.load))
        if order.settings.memory is not None:
            return _streamed(order, resolved)
        place = place_of(order.model)
        if place is not None and order.in_place:
            raise InputError("`in_place` is for a model in memory; leave it out for a folder, and say with `output` where the result goes")
        loaded = take(order.model, order.tokenizer, order.load)
        with resting(loaded.model):
            return _in_memory(order, loaded, live=place is None and loaded is not order.model)


def _with_tower(order: _Order) -> _Order:
    """Returns an order for the model that a tower of a multimodal checkpoint is, where one is asked for."""
    settings = order.settings
    if settings.tower is None:
        if settings.keep_rest:
            raise InputError("`keep_rest` keeps what a multimodal checkpoint holds beside its `tower`; name one, or leave it out")
        return order
    place = place_of(order.model)
    if place is None:
        raise InputError("`tower` is for a checkpoint on disk; give its folder or hub id, or the language model itself without `tower`")
    if settings.memory is not None:
        raise InputError(
            "`memory` does not read single towers; prune with `tower` and without it, or take the tower out of the folder first"
        )
    if settings.keep_rest and "vocabulary" in settings.targets:
        raise InputError("the other towers use token ids of their own; leave `keep_rest` out, or `vocabulary` out of `targets`")
    return replace(order, model=load_tower(place, settings.tower, with_float64(order.load)), checkpoint=place)


def _write(order: _Order, result: PruneResult) -> PruneResult:
    """Saves a result where it was asked for."""
    if order.output is None:
        return result
    if order.checkpoint is None or result.model is None:
        result.save_pretrained(order.output)
        return result
    notes = (left_behind(order.checkpoint, order.load),)
    if order.settings.keep_rest:
        card = card_of(result.provenance)
        save_inside(result.model, result.tokenizer, order.checkpoint, order.output, result.provenance, card, order.load)
    else:
        result.save_pretrained(order.output)
    return replace(result, notes=(*result.notes, *(note for note in notes if note)))


def _vocabulary(order: _Order) -> PruneResult:
    """Cuts the vocabulary of a model."""
    loaded = take(order.model, order.tokenizer, order.load)
    live = place_of(order.model) is None and loaded is not order.model
    settings = order.settings
    done = prune_vocabulary(
        loaded,
        settings,
        order.seed,
        order.plan,
        lambda: counted_texts(loaded, settings, order.calibration),
        order.say,
        dry_run=order.dry_run,
    )
    record = record_of(loaded, done.plan, done.resolved, command=order.command)
    if live and done.model is not None:
        own_tensors(done.model, loaded.model)
    result = PruneResult(done.plan, done.model, loaded, done.groups, done.resolved, done.notes, record, done.tokenizer)
    if not order.dry_run:
        result = _write(order, result)
    return replace(result, model=become(loaded.model, done.model)) if live and order.in_place and done.model is not None else result


def _experts(order: _Order) -> PruneResult:
    """Cuts the experts of a mixture."""
    live = not isinstance(order.model, str | Path | Loaded)
    loaded = take(order.model, order.tokenizer, order.load) if isinstance(order.model, str | Path) else take(order.model, order.tokenizer)
    wanted = experts_wanted(loaded.model, order.settings, order.seed)
    if order.plan is not None:
        check_plan(wanted.groups, order.plan)
        check_counts(wanted.groups, order.plan)
    windows = draw_windows(loaded, order.text(loaded), wanted.resolved) if order.plan is None else None
    order.say("scoring the experts")
    plan = order.plan or plan_experts(wanted, WholeModel(loaded.model, windows).walk())
    pruned = None if order.dry_run else cut_experts(loaded.model, wanted.groups, plan)
    if live and pruned is not None:
        own_tensors(pruned, loaded.model)
    record = record_of(loaded, plan, wanted.resolved, command=order.command)
    notes = ()
    if pruned is not None:
        order.say("comparing with random removal of the same size")
        read = windows_to_judge(loaded, order.seed, windows)
        notes = worse_than_random(Chosen(loaded.model, wanted.groups, plan, pruned, read, order.seed, cut=cut_experts))
    result = PruneResult(plan, pruned, loaded, wanted.groups, wanted.resolved, notes, record)
    if not order.dry_run:
        result = _write(order, result)
    return replace(result, model=become(loaded.model, pruned)) if live and order.in_place and pruned is not None else result


def _streamed(order: _Order, resolved: ResolvedPrune) -> PruneResult:
    """Prunes a checkpoint within a memory limit."""
    if order.calibration is None:
        refuse_several(order.settings)
    check_own_text(order.settings, order.calibration)
    place = place_of(order.model)
    if place is None:
        raise InputError("`memory` is for models that are not loaded yet; give a folder or a hub id, or leave it out")
    if order.output is None and not order.dry_run:
        raise InputError("`memory` keeps the pruned model on disk; say where with `output`")
    output = None if order.dry_run else order.output
    done = prune_streamed(StreamedPrune(place, output, resolved, order.load, order.text, order.plan, order.command, order.say))
    record = record_of(done.loaded, done.plan, done.resolved, command=order.command)
    return PruneResult(done.plan, None, done.loaded, done.groups, done.resolved, done.notes, record)


def _in_memory(order: _Order, loaded: Loaded, *, live: bool) -> PruneResult:
    """Prunes a model that is in memory."""
    model = loaded.model
    kinds = kinds_wanted(order.settings, order.plan)
    found = look_for(model, [kind for kind in kinds if kind != VOCABULARY])
    view = ModelView(model)
    resolved = with_shape(order.resolved(view), found.groups, view.family)
    groups = found.groups if order.plan is not None else only_wanted(found.groups, resolved.settings)
    every = with_tokens(groups, model) if VOCABULARY in kinds else groups
    check_own_text(order.settings, order.calibration)
    if order.plan is not None:
        check_plan(every, order.plan)
        check_counts(every, order.plan)
    else:
        budget_of(groups, resolved.settings)  # before any text is read
        refuse_unlike_layers(resolved.settings, groups, model.config)
    drawn = drawn_windows(loaded, resolved, order.calibration, order.say) if resolved.needs_text else None
    windows = drawn.windows_NT if drawn is not None else None
    if windows is not None and order.plan is None:
        order.say(forecast(view, groups, resolved.settings, windows))
    tokens = None
    if VOCABULARY in kinds and order.plan is None:
        assert drawn is not None, "it is weighed by measured damage"
        tokens = priced_tokens(loaded, drawn.parts, resolved.seed, order.say)
    plan = order.plan if order.plan is not None else plan_pruning(model, groups, resolved, windows, say=order.say, tokens=tokens)
    check_text(plan, windows)
    notes = (
        (*resolved.notes, *left_out(resolved.settings, replace(found, groups=every)), *missed_by_shape(plan, groups, model.config))
        if order.plan is None
        else ()
    )
    notes = notes if tokens is None else (*notes, tokens.note(plan))
    record = record_of(loaded, plan, resolved, command=order.command)
    if drawn is not None and drawn.corpus is not None and order.calibration is not None:
        record = replace(record, settings={**record.settings, "calibration": described(drawn.corpus)})
    if order.dry_run:
        return PruneResult(plan, None, loaded, every, resolved, notes, record)
    source_N = drawn.source_N if drawn is not None else None
    inside = within_layers(groups, plan)
    pruned = cut_to_plan(model, groups, inside, resolved, windows, source_N=source_N, say=order.say)
    if resolved.settings.criterion != BASELINE:
        order.say("comparing with random removal of the same size")
        read = windows_to_judge(loaded, resolved.seed, windows, drawn.corpus if drawn is not None else None)
        notes = (*notes, *worse_than_random(Chosen(model, groups, inside, pruned, read, resolved.seed)))
    line = by_source(model, pruned, drawn.judged) if drawn is not None else None
    notes = (*notes, line) if line is not None else notes
    smaller = None
    if len(inside.cuts) < len(plan.cuts):
        order.say("cutting the vocabulary")
        pruned, smaller = without_tokens(pruned, require_tokenizer(loaded), plan)
    if live:
        own_tensors(pruned, model)
    result = PruneResult(plan, pruned, loaded, every, resolved, notes, record, smaller)
    result = _write(order, result)
    return replace(result, model=become(model, pruned)) if live and order.in_place else result


def plan_pruning(
    model: PreTrainedModel,
    groups: Groups,
    resolved: ResolvedPrune,
    windows: Tensor | None,
    *,
    say: Say = say_nothing,
    tokens: PricedTokens | None = None,
) -> PrunePlan:
    """Scores the groups of a model and chooses what stays; the model is left as it is.

    With several rounds, each round scores and cuts the result of the previous one and removes an equal share of the rest of the target.

    Args:
        model: The model, in evaluation mode.
        groups: Groups of the model.
        resolved: How it is pruned.
        windows: Calibration tokens, int64 (windows, tokens), from :func:`draw_windows`; None where nothing needs text.
        say: Called with a line of progress at each step.
        tokens: Tokens that may go in one budget with the groups; None where the vocabulary stays.

    Raises:
        InputError: The ratio cannot be met.
    """
    settings = resolved.settings
    planning = Planning(resolved, windows, say, tokens)
    budget = budget_of(groups, settings)
    view, current, plan = ModelView(model), groups, None
    for step in range(1, settings.rounds + 1):
        done = plan.achieved if plan is not None else 0.0
        wanted = done + (settings.ratio - done) / (settings.rounds - step + 1)
        share = (wanted - done) / (1.0 - done)
        found = planning.once(view, current, replace(budget, ratio=share))
        plan = found if plan is None else composed(groups, plan, found)
        if step < settings.rounds:
            view = ModelView(_cut(model, groups, plan, resolved, windows))
            current = discover(view, resolved.kinds)
            stay = enumerate(layers_after(groups, plan.cuts))
            budget = replace(budget, layers=tuple(new for new, old in stay if old in layers_in(settings.layers, groups.layers)))
    assert plan is not None
    return replace(plan, ratio=settings.ratio, made_with=planning.made_with(plan))


def cut_to_plan(
    model: PreTrainedModel,
    groups: Groups,
    plan: PrunePlan,
    resolved: ResolvedPrune,
    windows: Tensor | None,
    *,
    source_N: Tensor | None = None,
    say: Say = say_nothing,
) -> PreTrainedModel:
    """Returns the pruned model: the projections that read pruned channels are re-fitted, then all groups are cut.

    Args:
        model: The model, in evaluation mode; it is left as it is, and shares what was not cut with the result.
        groups: Groups of the model.
        plan: What stays.
        resolved: How projections are re-fitted.
        windows: Calibration tokens, int64 (windows, tokens); None where nothing is re-fitted.
        source_N: Source of each window, int64 (windows,): re-fits are judged by the one that they do worst on. None: there is one.
        say: Called with a line of progress at each step.
    """
    pruned = _cut(model, groups, plan, resolved, windows, source_N)
    if resolved.refit == "divergence" and plan.cuts:
        assert windows is not None
        effort = EFFORTS[resolved.settings.effort]
        refit_to_predictions(
            ModelView(pruned), model, windows, steps=effort.steps, seed=resolved.seed, least_gain=effort.least_gain, say=say
        )
    return pruned


def _cut(
    model: PreTrainedModel,
    groups: Groups,
    plan: PrunePlan,
    resolved: ResolvedPrune,
    windows: Tensor | None,
    source_N: Tensor | None = None,
) -> PreTrainedModel:
    if not plan.cuts or (resolved.refit is None and not resolved.settings.bridge):
        return cut(model, groups, plan)
    assert windows is not None
    return apply_plan(ModelView(model), groups, plan, windows, resolved.layerwise, source_N, bridged=resolved.settings.bridge)
