"""Compress a model by low rank: decompose every linear layer, choose the ranks, put the factors in place, save."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.atomic import reserved
from regraft.compression import COMPRESSORS, RANK_CHOICES, Compressor, Decomposed, factor_plan, with_damage
from regraft.data.text import Corpus
from regraft.errors import InputError
from regraft.evaluation.loss import evaluate_loss
from regraft.groups.discover import discover
from regraft.in_short import in_short
from regraft.models.encoders import is_encoder, is_encoder_folder, load_encoder
from regraft.models.live import ModelLike, own_tensors, place_of, remember, resting, take
from regraft.models.load import Loaded, locate_by, require_tokenizer
from regraft.models.save import save
from regraft.models.view import ModelView, fingerprint, parameter_count, refuse_factored
from regraft.numerics.truncation import Factors
from regraft.pipelines.compress.encoder import EncoderOrder, compress_encoder
from regraft.pipelines.compress.mix import mixed, pruned_for
from regraft.pipelines.compress.prepare import (
    CompressionTexts,
    decomposed,
    moved_plan,
    needs_judging,
    plan_from_ranks,
    projections_of,
    read_texts,
    space_of,
)
from regraft.pipelines.compress.record import card_of, rank_rows, record_of, refuse_short_text
from regraft.pipelines.compress.search import RankSearch, searched_ranks
from regraft.pipelines.compress.streamed import StreamedCompress, compress_streamed, refuse_whole_model
from regraft.pipelines.prune.score_cache import checksum_of
from regraft.pipelines.results import Saving
from regraft.pipelines.texts import Texts, described, in_memory, path_in, text_for
from regraft.plans import FactorPlan, FactorSpace, LossReport, Provenance, PrunePlan, RankPlan, to_dict
from regraft.progress import Say, say_nothing
from regraft.search.measurers import check_measurers
from regraft.settings import CompressSettings, LoadSettings, takes_settings, with_keywords
from regraft.surgery.factorize import densified, factorize
from regraft.surgery.trial_ranks import measured_damage
from regraft.training.pc_lora import FadeSettings, fade_out

PC_LORA = "pc_lora"


@dataclass(frozen=True, repr=False)
class CompressReport:
    """The sizes of a model before and after a compression.

    Attributes:
        parameters_before: Number of stored parameters of the uncompressed model.
        parameters_after: Number of stored parameters of the compressed model.
        rows: One for each kind of projection: its name, how many are factored, and their ranks.
        notes: Remarks for the user, a line each.
    """

    parameters_before: int
    parameters_after: int
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    def __str__(self) -> str:
        """Returns the sizes before and after, the ranks of each kind of projection, and the notes."""
        removed = 1.0 - self.parameters_after / self.parameters_before
        lines = [f"stored parameters {self.parameters_before:,} -> {self.parameters_after:,}: {removed:.2%} removed"]
        lines += [f"{row['projection']}: {row['factored']} factored, ranks {row['ranks']}" for row in self.rows]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, repr=False)
class CompressResult(Saving):
    """Result of compression.

    Attributes:
        plan: The factored layers and their ranks.
        model: The compressed model; None after a dry run, and with ``memory``, which keeps it on disk.
        loaded: The uncompressed model with its tokenizer and source; with ``memory``, without its weights.
        space: The ranks that were available, with their prices; None for a given plan.
        notes: Remarks for the user, a line each.
        test: Loss on the test text before and after, where one was given.
        pruned: Plan of the channels that were cut first, where channels and ranks were mixed; ``plan`` is for the model after this cut.
        record: How the model came to be; None after a dry run, for an encoder, and with ``memory``, where the folder has it.
    """

    plan: FactorPlan
    model: PreTrainedModel | None
    loaded: Loaded
    space: FactorSpace | None = None
    notes: tuple[str, ...] = ()
    test: tuple[LossReport, LossReport] | None = None
    pruned: PrunePlan | None = None
    record: Provenance | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, which compression leaves as it is."""
        return self.loaded.tokenizer

    @property
    def report(self) -> CompressReport:
        """The sizes before and after, with those of channels that were cut first, and the ranks."""
        return CompressReport(self._before, self._after, tuple(rank_rows(self.plan)), self.notes)

    @property
    def _before(self) -> int:
        return self.plan.parameters_before if self.pruned is None else self.pruned.parameters_before

    @property
    def _after(self) -> int:
        return parameter_count(self.model) if self.model is not None else self.plan.parameters_after  # more where it is written dense

    def save_pretrained(self, folder: str | Path, *, replace: bool = False) -> Provenance:
        """Saves the compressed causal language model with its tokenizer, record and card, completely or not at all.

        Args:
            folder: A new or empty folder.
            replace: Whether a folder that we wrote is replaced.

        Returns:
            The record as it was written.

        Raises:
            InputError: There is no model in memory, or it is an encoder.
            OutputError: The folder exists or cannot be written.
        """
        if self.model is None or self.record is None:
            raise InputError("there is no compressed language model in memory to save; compress with `output`, without `dry_run`")
        dense = bool(self.record.settings["compress"].get("dense"))
        return save(self.model, self.tokenizer, folder, self.record, card_of(self.record, dense=dense), replace=replace)

    def __repr__(self) -> str:
        """Returns the parameters and what holds the model, in one line."""
        kind = type(self.model).__name__ if self.model is not None else "no model in memory"
        return f"CompressResult({self._before:,} -> {self._after:,} stored parameters, {kind})"

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan and what was measured as plain JSON types."""
        found = to_dict(self.plan) | {"achieved": self.plan.achieved, "notes": list(self.notes)}
        if self.test is not None:
            found["test"] = {"before": to_dict(self.test[0]), "after": to_dict(self.test[1])}
        return found


@takes_settings(CompressSettings, LoadSettings, plan=FactorPlan | RankPlan | None)
def compress(
    model: ModelLike,
    output: str | Path | None = None,
    settings: CompressSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Texts | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    plan: FactorPlan | RankPlan | None = None,
    dry_run: bool = False,
    resume: bool = False,
    work: Path | None = None,
    command: str = "regraft.compress",
    say: Say = say_nothing,
    **keywords: Any,
) -> CompressResult:
    """Compresses a model to a share of its stored parameters.

    Args:
        model: A folder, a hub id, ``seedling``, or a model in memory, which is left as it is; for ``method`` ``pc_lora`` also an encoder
            without a head.
        output: Where the compressed model is saved; None keeps it in memory.
        settings: Settings of the decomposition and of the choice of ranks.
        tokenizer: The tokenizer for a model in memory.
        calibration: Text like that which the model is to work on: a file, texts, or a data set with a column ``text``.
        load: How a folder is loaded.
        seed: Seed for calibration windows, for tokens drawn from predictions and for proposals.
        plan: Ranks from an earlier run, on this model or on one of the same shape, whose factors are computed again; for method ``pc_lora``
            also a rank plan: a rank for each layer, and those without one stay dense.
        dry_run: Plan only: nothing is factored and nothing is written.
        resume: Go on with a search that was stopped (``ranks bayes``); its trials lie beside the output, or in ``work``.
        work: Folder of the trials of a search; None for one beside the output.
        command: How this was called, for the folder's record.
        say: Called with a line of progress at intervals.
        **keywords: Single settings by name, such as ``ratio=0.2``; they count before those in ``settings`` and ``load``.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    settings, load = with_keywords(command, keywords, settings or CompressSettings(), load or LoadSettings())
    if calibration is not None:
        settings = settings.model_copy(update={"calibration": path_in(calibration)})
    target = None if output is None else Path(output)
    with reserved(None if dry_run else target):
        if settings.method == PC_LORA and _is_encoder(model, load):
            order = _Order(settings, load, target, calibration, seed, None, dry_run, resume, work, command, say)
            return _encoder(model, tokenizer, plan, order)
        _refuse_clashes(settings, plan, place_of(model))
        if resume and settings.ranks != "bayes":
            say(f"`resume` goes on with a search, and `ranks={settings.ranks}` makes none: it begins anew")
        compressor_of(_method_of(settings, plan), settings)  # a wrong name is refused before a model is loaded
        order = _Order(settings, load, target, in_memory(calibration), seed, plan, dry_run, resume, work, command, say)
        if settings.memory is not None:
            return _streamed(model, order)
        loaded = take(model, tokenizer, load)
        with resting(loaded.model):
            return _carried_out(loaded, order, place_of(model))


@dataclass(frozen=True)
class _Order:
    """The parameters of a call of :func:`compress`, other than the model."""

    settings: CompressSettings
    load: LoadSettings
    target: Path | None
    calibration: Texts | None
    seed: int
    plan: FactorPlan | RankPlan | None
    dry_run: bool
    resume: bool
    work: Path | None
    command: str
    say: Say


def _carried_out(loaded: Loaded, order: _Order, place: str | Path | None) -> CompressResult:
    settings, plan, seed, say = order.settings, order.plan, order.seed, order.say
    method = _method_of(settings, plan)
    compressor = compressor_of(method, settings)
    refuse_factored(loaded.model, f"'{loaded.source}'")
    view = ModelView(loaded.model)
    projections = projections_of(view, settings.targets)
    texts = read_texts(loaded, settings, compressor, seed, judging=plan is None and needs_judging(settings), calibration=order.calibration)
    found = decomposed(loaded, projections, compressor, settings, texts.fitted, seed, say)
    space: FactorSpace | None = None
    start, pruning = loaded, None
    if settings.mix:
        plan, space, start, found, pruning = _mixed(loaded, found, compressor, texts, settings, seed, say)
    else:
        match plan:
            case None:
                space = space_of(loaded, found, compressor, settings, settings.ratio)
                plan = _choose(loaded, found, space, texts, order, place)
            case RankPlan():
                plan = plan_from_ranks(plan, found, loaded.fingerprint, parameter_count(loaded.model), settings)
            case FactorPlan():
                plan = moved_plan(loaded, plan)
    refuse_short_text(plan, found)
    if order.dry_run:
        return CompressResult(plan, None, loaded, space, texts.notes, None, pruning)
    by_name = {one.priced.name: one for one in found}
    factors = {entry.module: by_name[entry.module].truncation.at(entry.rank) for entry in plan.factorings}
    if method == PC_LORA:
        assert texts.fitted is not None
        factors = _faded(start.model, factors, texts.fitted, settings, seed, say)
        plan = replace(plan, method=PC_LORA, predicted_nats=None)
    # Where nothing is factored the result is a copy all the same.
    model = factorize(start.model, plan, factors) if factors else copy.deepcopy(start.model)
    if settings.dense:
        model = densified(model)
    own_tensors(model, loaded.model)
    test = _tested(loaded, model, texts.test)
    record = record_of(loaded, plan, settings, seed=seed, command=order.command, pruning=pruning)
    if texts.given is not None:
        record = replace(record, settings={**record.settings, "calibration": described(texts.given)})
    result = CompressResult(plan, remember(model, record), loaded, space, texts.notes, test, pruning, record)
    if order.target is not None:
        result.save_pretrained(order.target)
    return result


def _is_encoder(source: ModelLike, load: LoadSettings) -> bool:
    match source:
        case Loaded(model=model) | (PreTrainedModel() as model):
            return is_encoder(model)
        case _:
            return is_encoder_folder(locate_by(source, load))


def _encoder(
    source: ModelLike, tokenizer: PreTrainedTokenizerBase | None, plan: FactorPlan | RankPlan | None, order: _Order
) -> CompressResult:
    """Compresses an encoder, which PC-LoRA alone does."""
    settings = order.settings
    if isinstance(plan, FactorPlan):
        raise InputError("an encoder takes a rank plan: a rank for each layer by its full name; leave the plan out to choose ranks")
    match source:
        case PreTrainedModel():
            loaded = Loaded(source, tokenizer, source.name_or_path or type(source).__name__, fingerprint(source), None)
        case Loaded():
            loaded = source
        case _:
            loaded = load_encoder(source, order.load)
    corpus = text_for(loaded, settings.calibration if order.calibration is None else order.calibration, "train", "calibration")
    with resting(loaded.model):
        wanted = EncoderOrder(settings, corpus, plan, order.target, order.dry_run, order.seed, order.command, order.say)
        done = compress_encoder(loaded, wanted)
    return CompressResult(done.plan, done.model, loaded, done.space, done.notes)


def _streamed(source: ModelLike, order: _Order) -> CompressResult:
    """Compresses within a memory limit; the model stays on disk."""
    settings, plan = order.settings, order.plan
    place = place_of(source)
    if place is None:
        raise InputError("`memory` is for models that are not loaded yet; give a folder or a hub id, or leave it out")
    if order.target is None and not order.dry_run:
        raise InputError("with `memory` the compressed model stays on disk; say with `output` where it goes, or look first with `dry_run`")
    method = _method_of(settings, plan)
    refuse_whole_model(settings, method)  # among them is the one method that takes a rank plan
    assert not isinstance(plan, RankPlan)
    output, compressor = None if order.dry_run else order.target, compressor_of(method, settings)
    text, load = order.calibration, order.load
    request = StreamedCompress(place, output, settings, compressor, text, load, order.seed, plan, order.command, order.say)
    done = compress_streamed(request)
    return CompressResult(done.plan, None, done.loaded, done.space, done.notes)


def _method_of(settings: CompressSettings, plan: FactorPlan | RankPlan | None) -> str:
    """Returns the method of a call: a plan of compress brings its own."""
    return plan.method if isinstance(plan, FactorPlan) else settings.method


def compressor_of(method: str, settings: CompressSettings) -> Compressor:
    """Returns the compressor of a method; for PC-LoRA that of its warm start, or ``fisher`` with a random one.

    Raises:
        InputError: There is no such method.
    """
    if method == PC_LORA:
        return COMPRESSORS.get("fisher" if settings.warm_start == "random" else settings.warm_start)
    return COMPRESSORS.get(method)


def _faded(
    model: PreTrainedModel, starts: Mapping[str, Factors], windows: Tensor, settings: CompressSettings, seed: int, say: Say
) -> dict[str, Factors]:
    """Returns the factors after training while the dense weights fade."""
    fading = FadeSettings(
        steps=settings.fade_steps,
        lr=settings.fade_lr,
        batch=settings.fade_batch,
        schedule=settings.fade_schedule,
        fade=settings.fade_share,
        task_weight=settings.task_weight,
    )
    transposed = ModelView(model).family.transposed
    return fade_out(model, starts, windows, fading, transposed=transposed, random=settings.warm_start == "random", seed=seed, say=say)


def _mixed(
    loaded: Loaded,
    found: list[Decomposed],
    compressor: Compressor,
    texts: CompressionTexts,
    settings: CompressSettings,
    seed: int,
    say: Say,
) -> tuple[FactorPlan, FactorSpace, Loaded, list[Decomposed], PrunePlan | None]:
    """Chooses the parts that lose channels and those that lose ranks, and cuts the channels.

    Returns:
        The plan of the ranks and the choices it is from, the model that it is of, its decompositions, and the plan of the channels.
    """
    windows = texts.fitted if texts.fitted is not None else texts.judging
    assert windows is not None
    assert texts.judging is not None
    truncations = {one.priced.name: one.truncation for one in found}
    # The budget is met by both together: ranks alone may not be able to.
    whole = space_of(loaded, found, compressor, settings, 0.0)
    priced = with_damage(whole, measured_damage(loaded.model, whole, truncations, texts.judging))
    groups = discover(loaded.model)
    choice = mixed(loaded, groups, priced, settings, windows, seed, say)
    start = loaded if choice.plan is None else pruned_for(loaded, groups, choice.plan, settings, windows, seed, say)
    start = replace(start, fingerprint=fingerprint(start.model))
    count, most = parameter_count(start.model), math.floor((1.0 - settings.ratio) * parameter_count(loaded.model))
    made_with: dict[str, Any] = {"settings": settings.decisive(), "seed": seed, "windows_sha256": checksum_of(texts.fitted)}
    if count <= most or not choice.factored:
        empty = FactorPlan(start.fingerprint, compressor.name, "mix", settings.layout, settings.ratio, count, count, (), None, made_with)
        return empty, priced, start, [], choice.plan
    view = ModelView(start.model)
    chosen = {name: module for name, module in projections_of(view).items() if name in choice.factored}
    again = decomposed(start, chosen, compressor, settings, texts.fitted, seed, say)
    space = space_of(start, again, compressor, settings, (count - most) / count)
    ranks = RANK_CHOICES.get("knapsack")(space)
    biases = {one.priced.name: one.has_bias or one.truncation.mean_I is not None for one in again}
    plan = replace(factor_plan(space, ranks, "mix", settings.ratio, biases), made_with=made_with)
    return plan, space, start, again, choice.plan


def _trials_in(order: _Order) -> Path | None:
    """Returns the folder of the trials of a search; None for one that is removed afterwards."""
    if order.work is not None or order.target is None:
        return order.work
    return order.target.with_name(f"{order.target.name}.search")


def _choose(
    loaded: Loaded, found: list[Decomposed], space: FactorSpace, texts: CompressionTexts, order: _Order, place: str | Path | None
) -> FactorPlan:
    """Chooses the ranks and returns the plan, with what it was made with."""
    settings, seed, say = order.settings, order.seed, order.say
    truncations = {one.priced.name: one.truncation for one in found}
    choice = settings.ranks
    if choice == "auto":
        choice = "knapsack" if space.unit == "nats" or settings.prices == "measured" else "uniform"
    if settings.prices == "measured":
        assert texts.judging is not None
        say("measuring the damage of every layer alone")
        space = with_damage(space, measured_damage(loaded.model, space, truncations, texts.judging))
    made_with: dict[str, Any] = {
        "settings": settings.decisive() | {"ranks": choice},
        "seed": seed,
        "windows_sha256": checksum_of(texts.fitted),
        "judged_sha256": checksum_of(texts.judging),
    }
    if choice == "bayes":
        assert texts.judging is not None
        with TemporaryDirectory(prefix="regraft-") as scratch:
            folder = _trials_in(order) or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            how = RankSearch(
                trials=settings.trials,
                layer_groups=settings.layer_groups,
                kl_weight=settings.kl_weight,
                identity=made_with | {"fingerprint": loaded.fingerprint},
                folder=folder,
                seed=seed,
                resume=order.resume,
                workers=settings.workers,
                storage=settings.storage,
                ray=settings.ray,
                source=None if place is None else str(place),
                load=order.load,
            )
            ranks = searched_ranks(loaded.model, truncations, space, texts.judging, how, say)
    else:
        ranks = RANK_CHOICES.get(choice)(space)
    biases = {one.priced.name: one.has_bias or one.truncation.mean_I is not None for one in found}
    name = f"{choice} ({settings.prices} prices)" if settings.prices == "measured" else choice
    return replace(factor_plan(space, ranks, name, settings.ratio, biases), made_with=made_with)


def _refuse_clashes(settings: CompressSettings, plan: FactorPlan | RankPlan | None, place: str | Path | None) -> None:
    """Refuses settings of which two would make the same choice, and those that ask for what cannot be.

    Raises:
        InputError: Two of them choose the same, or processes are to measure a model that is in this one only.
    """
    if isinstance(plan, RankPlan) and settings.method != PC_LORA:
        raise InputError(f"a rank plan is for method pc_lora, not for {settings.method}; give a plan that compress wrote")
    check_measurers(settings.workers, settings.ray)
    elsewhere = settings.workers > 1 or settings.ray is not None
    if settings.ranks != "bayes" and (elsewhere or settings.storage is not None):
        raise InputError(f"`workers`, `ray` and `storage` are for a search, and `ranks={settings.ranks}` makes none; use `ranks=bayes`")
    if elsewhere and place is None:
        raise InputError(
            "`workers` and `ray` measure in processes that load the model themselves; give a folder or a hub id, or leave them out"
        )
    if settings.mix and plan is not None:
        raise InputError("mix chooses channels and ranks anew, and a plan brings ranks; use one of the two")
    if settings.mix and settings.ranks not in ("auto", "knapsack"):
        raise InputError(f"mix is a knapsack of channels and ranks, and ranks {settings.ranks} is another choice; use ranks auto")


def _tested(loaded: Loaded, model: PreTrainedModel, test: Corpus | None) -> tuple[LossReport, LossReport] | None:
    if test is None:
        return None
    tokenizer = require_tokenizer(loaded)
    return evaluate_loss(loaded.model, tokenizer, test), evaluate_loss(model, tokenizer, test)
