"""Compress a model by low rank: decompose every linear layer, choose the ranks, put the factors in place, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.atomic import refuse_existing
from regraft.compression import (
    COMPRESSORS,
    RANK_CHOICES,
    Compressor,
    Decomposed,
    decompose,
    factor_plan,
    factor_space,
    gather,
    with_damage,
)
from regraft.data.text import Corpus, read_corpus
from regraft.data.tokens import calibration_windows, texts_of, window_tokens
from regraft.errors import InputError, PlanError, did_you_mean
from regraft.evaluation.loss import evaluate_loss
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.load import load as load_model
from regraft.models.save import save
from regraft.models.view import ModelView, fingerprint, parameter_count, refuse_factored
from regraft.pipelines.compress.record import card_of, record_of
from regraft.pipelines.compress.search import searched_ranks
from regraft.pipelines.prune.score_cache import checksum_of
from regraft.plans import FactorPlan, FactorSpace, LossReport, to_dict
from regraft.settings import CALIBRATION_TOKENS, CompressSettings, LoadSettings
from regraft.surgery.factorize import check_factor_plan, densified, factorize
from regraft.surgery.trial_ranks import TrialModel, measured_damage

Say = Callable[[str], None]
IN_MEMORY = "a model in memory"
_JUDGED = 4  # one window in so many judges ranks, where no text of its own does


@dataclass(frozen=True)
class CompressResult:
    """What compression gave.

    Attributes:
        plan: Which layers are factored, at which rank.
        model: The compressed model; None after a dry run.
        loaded: The model before, with its tokenizer and source.
        space: The ranks that were chosen among, with their prices; None for a plan that was given.
        notes: What the user should know, a line each.
        test: Loss on the test text before and after, where one was given.
    """

    plan: FactorPlan
    model: PreTrainedModel | None
    loaded: Loaded
    space: FactorSpace | None = None
    notes: tuple[str, ...] = ()
    test: tuple[LossReport, LossReport] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan and what was measured as plain JSON types."""
        found = to_dict(self.plan) | {"achieved": self.plan.achieved, "notes": list(self.notes)}
        if self.test is not None:
            found["test"] = {"before": to_dict(self.test[0]), "after": to_dict(self.test[1])}
        return found


@dataclass(frozen=True)
class _Texts:
    """Calibration windows, windows that judge ranks, and the test text."""

    fitted: Tensor | None
    judging: Tensor | None
    test: Corpus | None
    notes: tuple[str, ...] = field(default=())


def compress(
    source: str | Path | PreTrainedModel,
    output: str | Path | None = None,
    settings: CompressSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    plan: FactorPlan | None = None,
    dry_run: bool = False,
    resume: bool = False,
    command: str = "regraft.compress",
    say: Say = lambda line: None,
) -> CompressResult:
    """Compresses a model to a share of its stored parameters.

    Args:
        source: A folder, a hub id, ``seedling``, or a model in memory, which is left as it is.
        output: Where the compressed model is saved; None keeps it in memory.
        settings: How layers are decomposed and how their ranks are chosen.
        tokenizer: Of a model in memory.
        load: How a folder is loaded.
        seed: Of calibration windows, of tokens drawn from predictions and of proposals.
        plan: Ranks that were chosen before, on this model or on one of the same shape; the factors are made anew.
        dry_run: Plan only: nothing is factored and nothing is written.
        resume: Go on with a search that was stopped (``ranks bayes``); its trials lie beside the output.
        command: How this was called, for the folder's record.
        say: Called with one line now and then.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    settings = settings or CompressSettings()
    target = None if output is None else Path(output)
    if target is not None and not dry_run:
        refuse_existing(target)
    compressor = COMPRESSORS.get(settings.method if plan is None else plan.method)
    loaded = _loaded(source, tokenizer, load or LoadSettings())
    refuse_factored(loaded.model, f"'{loaded.source}'")
    view = ModelView(loaded.model)
    projections = projections_of(view, settings.targets)
    texts = _read(loaded, settings, compressor, seed, judging=plan is None and _judges(settings))
    found = _decomposed(view, projections, compressor, settings, texts.fitted, seed, say)
    space: FactorSpace | None = None
    if plan is None:
        space = _space(loaded, found, compressor, settings)
        plan = _choose(loaded, found, space, texts, settings, seed, target, resume=resume, say=say)
    else:
        plan = _moved(loaded, plan)
    _refuse_short_text(plan, found)
    notes = texts.notes
    if dry_run:
        return CompressResult(plan, None, loaded, space, notes)
    by_name = {one.priced.name: one for one in found}
    factors = {entry.module: by_name[entry.module].truncation.at(entry.rank) for entry in plan.factorings}
    model = factorize(loaded.model, plan, factors)
    if settings.dense:
        model = densified(model)
    test = _tested(loaded, model, texts.test)
    if target is not None:
        record = record_of(loaded, plan, settings, seed=seed, command=command)
        save(model, loaded.tokenizer, target, record, card_of(record, dense=settings.dense))
    return CompressResult(plan, model, loaded, space, notes, test)


def projections_of(view: ModelView, targets: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Returns the linear layers of the decoder by full name, in the order of the model.

    Args:
        view: The model.
        targets: Last parts of names; none for all.

    Raises:
        InputError: A target names none.
    """
    found = {
        f"{view.layer_name(layer)}.{name}": module
        for layer in range(len(view.layers))
        for name in view.linear_names()
        if (module := view.module(layer, name)) is not None
    }
    known = tuple(dict.fromkeys(name.rpartition(".")[2] for name in found))
    for target in targets:
        if target not in known:
            raise InputError(f"target '{target}' is no projection of this model; it has {', '.join(known)}{did_you_mean(target, known)}")
    return {name: module for name, module in found.items() if not targets or name.rpartition(".")[2] in targets}


def _loaded(source: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, load: LoadSettings) -> Loaded:
    if isinstance(source, PreTrainedModel):
        return Loaded(source, tokenizer, source.name_or_path or IN_MEMORY, fingerprint(source), None)
    return load_model(source, load)


def _judges(settings: CompressSettings) -> bool:
    return settings.ranks == "bayes" or settings.prices == "measured"


def _read(loaded: Loaded, settings: CompressSettings, compressor: Compressor, seed: int, *, judging: bool) -> _Texts:
    """Reads the texts that are needed, and refuses to choose by the one that tests.

    Raises:
        InputError: A text that fits or judges is the test text.
    """
    test = None if settings.test is None else read_corpus(settings.test, "test")
    fits = compressor.looks_at != "weights"
    fitted = read_corpus(settings.calibration, "validation") if fits or (judging and settings.validation is None) else None
    judges = read_corpus(settings.validation, "validation") if judging and settings.validation is not None else None
    for name, corpus in (("calibration", fitted), ("validation", judges)):
        _refuse_test_text(name, corpus, test)
    if fitted is None and judges is None:
        return _Texts(None, None, test)
    tokens = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "seq_len")

    def windows(corpus: Corpus) -> Tensor:
        return calibration_windows(corpus, require_tokenizer(loaded), settings.samples, tokens, seed)

    drawn = None if fitted is None else windows(fitted)
    if not judging or judges is not None:
        return _Texts(drawn, None if judges is None else windows(judges), test)
    assert drawn is not None
    judged = max(1, len(drawn) // _JUDGED)
    note = f"ranks were judged on {judged} of the {len(drawn)} calibration windows, which no factor was fitted to"
    return _Texts(drawn[:-judged] if len(drawn) > 1 else drawn, drawn[-judged:], test, (note,))


def _refuse_test_text(name: str, corpus: Corpus | None, test: Corpus | None) -> None:
    """Refuses a text that has a document of the test text, or of the built-in test split."""
    if corpus is None:
        return
    own = {text.strip() for text in texts_of(corpus)}
    for held in (test, read_corpus(None, "test")):
        if held is not None and any(text.strip() in own for text in texts_of(held)):
            raise InputError(
                f"the {name} text '{corpus.name}' holds documents of the test text '{held.name}'; what is chosen by the text that tests it "
                "is not tested: give another text"
            )


def _decomposed(
    view: ModelView,
    projections: Mapping[str, nn.Module],
    compressor: Compressor,
    settings: CompressSettings,
    windows: Tensor | None,
    seed: int,
    say: Say,
) -> list[Decomposed]:
    evidence = gather(view.model, projections, windows, compressor.looks_at, transposed=view.family.transposed, seed=seed)
    start = f"{view.family.layers}."
    return decompose(
        evidence,
        compressor,
        settings.layout,
        lambda name: int(name.removeprefix(start).partition(".")[0]),
        lambda name: projections[name]._parameters.get("bias") is not None,
        say,
    )


def _space(loaded: Loaded, found: list[Decomposed], compressor: Compressor, settings: CompressSettings) -> FactorSpace:
    return factor_space(
        [one.priced for one in found],
        fingerprint=loaded.fingerprint,
        method=compressor.name,
        unit="nats" if compressor.unit == "nats" else "share",
        layout=settings.layout,
        parameters=parameter_count(loaded.model),
        ratio=settings.ratio,
        align=settings.align if isinstance(settings.align, int) else None,
    )


def _choose(
    loaded: Loaded,
    found: list[Decomposed],
    space: FactorSpace,
    texts: _Texts,
    settings: CompressSettings,
    seed: int,
    target: Path | None,
    *,
    resume: bool,
    say: Say,
) -> FactorPlan:
    """Chooses the ranks and returns the plan, with what it was made with."""
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
            folder = Path(scratch) if target is None else target.with_name(f"{target.name}.search")
            folder.mkdir(parents=True, exist_ok=True)
            ranks = searched_ranks(
                TrialModel(loaded.model, truncations),
                space,
                texts.judging,
                trials=settings.trials,
                layer_groups=settings.layer_groups,
                kl_weight=settings.kl_weight,
                identity=made_with | {"fingerprint": loaded.fingerprint},
                folder=folder,
                seed=seed,
                resume=resume,
                say=say,
            )
    else:
        ranks = RANK_CHOICES.get(choice)(space)
    biases = {one.priced.name: one.has_bias or one.truncation.mean_I is not None for one in found}
    name = f"{choice} ({settings.prices} prices)" if settings.prices == "measured" else choice
    return replace(factor_plan(space, ranks, name, settings.ratio, biases), made_with=made_with)


def _moved(loaded: Loaded, plan: FactorPlan) -> FactorPlan:
    """Returns a plan for this model; one of another model of the same shape becomes one of this.

    Raises:
        PlanError: The model has other layers or sizes.
    """
    count = parameter_count(loaded.model)
    if plan.parameters_before != count:
        raise PlanError(
            f"the plan is of a model with {plan.parameters_before:,} parameters, '{loaded.source}' has {count:,}; make one for this model"
        )
    moved = replace(plan, fingerprint=loaded.fingerprint)
    check_factor_plan(loaded.model, moved)
    return moved


def _refuse_short_text(plan: FactorPlan, found: list[Decomposed]) -> None:
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


def _tested(loaded: Loaded, model: PreTrainedModel, test: Corpus | None) -> tuple[LossReport, LossReport] | None:
    if test is None:
        return None
    tokenizer = require_tokenizer(loaded)
    return evaluate_loss(loaded.model, tokenizer, test), evaluate_loss(model, tokenizer, test)
