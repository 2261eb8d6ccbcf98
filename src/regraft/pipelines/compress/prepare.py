"""The inputs of the choice of ranks: texts, projections, their decompositions, and the ranks with their prices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from regraft.compression import Compressor, Decomposed, Evidence, SavedMoments, decompose, factor_space, gather, remembered
from regraft.compression.gather import weight_of
from regraft.data.text import Corpus, read_corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import InputError, PlanError
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.view import ModelView, parameter_count
from regraft.pipelines.prune.score_cache import checksum_of
from regraft.pipelines.texts import Texts, text_for
from regraft.plans import Factoring, FactorPlan, FactorSpace, RankPlan, stored_numbers
from regraft.progress import Say
from regraft.settings import CALIBRATION_TOKENS, CompressSettings
from regraft.surgery.factorize import check_factor_plan
from regraft.surgery.targets import matching

_JUDGED = 4  # one window in so many judges ranks, where no text of its own does


@dataclass(frozen=True)
class CompressionTexts:
    """Calibration windows, windows that judge ranks, the test text, remarks, and calibration text that was given in memory."""

    fitted: Tensor | None
    judging: Tensor | None
    test: Corpus | None
    notes: tuple[str, ...] = field(default=())
    given: Corpus | None = None


def projections_of(view: ModelView, targets: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Returns the linear layers of the decoder by full name, in the order of the model.

    Args:
        view: The model.
        targets: Names, globs or regular expressions, as :func:`regraft.surgery.targets.matching` takes them; none for all.

    Raises:
        InputError: A target names none.
    """
    found = {
        f"{view.layer_name(layer)}.{name}": module
        for layer in range(len(view.layers))
        for name in view.linear_names()
        if (module := view.module(layer, name)) is not None
    }
    chosen = matching(found, targets) if targets else frozenset(found)
    return {name: module for name, module in found.items() if name in chosen}


def needs_judging(settings: CompressSettings) -> bool:
    """Returns whether ranks are chosen by what the model does on text."""
    return settings.ranks == "bayes" or settings.prices == "measured" or settings.mix


def read_texts(
    loaded: Loaded, settings: CompressSettings, compressor: Compressor, seed: int, *, judging: bool, calibration: Texts | None = None
) -> CompressionTexts:
    """Reads the texts that are needed, and refuses to choose by the one that tests.

    Args:
        loaded: The model that they are for.
        settings: Files of the texts.
        compressor: What the layers are decomposed by.
        seed: Seed for the draw of the windows.
        judging: Whether ranks are chosen by what the model does on text.
        calibration: Calibration text in memory, in place of a file.

    Raises:
        DataError: Calibration text is missing: only seedling has one of its own.
        InputError: A text that fits or judges is the test text.
    """
    test = None if settings.test is None else read_corpus(settings.test, "test")
    fits = compressor.looks_at != "weights"
    given = settings.calibration if calibration is None else calibration
    needed = fits or (judging and settings.validation is None)
    fitted = text_for(loaded, given, "validation", "calibration") if needed else None
    held = None if calibration is None else fitted
    judges = read_corpus(settings.validation, "validation") if judging and settings.validation is not None else None
    for name, corpus in (("calibration", fitted), ("validation", judges)):
        _refuse_test_text(name, corpus, test)
    if fitted is None and judges is None:
        return CompressionTexts(None, None, test)
    tokens = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "seq_len")

    def windows(corpus: Corpus) -> Tensor:
        return calibration_windows(corpus, require_tokenizer(loaded), settings.samples, tokens, seed)

    drawn = None if fitted is None else windows(fitted)
    if not judging or judges is not None:
        return CompressionTexts(drawn, None if judges is None else windows(judges), test, given=held)
    assert drawn is not None
    judged = max(1, len(drawn) // _JUDGED)
    note = f"ranks were judged on {judged} of the {len(drawn)} calibration windows, which no factor was fitted to"
    return CompressionTexts(drawn[:-judged] if len(drawn) > 1 else drawn, drawn[-judged:], test, (note,), held)


def _refuse_test_text(name: str, corpus: Corpus | None, test: Corpus | None) -> None:
    """Refuses a text that has a document of the test text, or of the built-in test split."""
    if corpus is None:
        return
    own = _contents(corpus)
    for held in (test, read_corpus(None, "test")):
        if held is not None and own & _contents(held):
            raise InputError(
                f"the {name} text '{corpus.name}' holds documents of the test text '{held.name}'; what is chosen by the text that tests it "
                "is not tested: give another text"
            )


def _contents(corpus: Corpus) -> set[str]:
    """Returns the texts of a corpus, whatever tokenizer will read them."""
    answers = (f"{record.instruction}\n{record.input}\n{record.output}" for record in corpus.records)
    return {text.strip() for text in (*corpus.documents, *answers)}


def decomposed(
    loaded: Loaded,
    projections: Mapping[str, nn.Module],
    compressor: Compressor,
    settings: CompressSettings,
    windows: Tensor | None,
    seed: int,
    say: Say,
) -> list[Decomposed]:
    """Decomposes projections of a model on the inputs and gradients that they have in it, in the order of the model."""
    view = ModelView(loaded.model)
    transposed = view.family.transposed

    def gathered(names: Sequence[str]) -> Iterator[Evidence]:
        wanted = {name: projections[name] for name in names}
        return gather(view.model, wanted, windows, compressor.looks_at, transposed=transposed, seed=seed)

    evidence = remembered(
        saved_moments(settings, loaded.fingerprint, windows, seed),
        {name: partial(weight_of, module, transposed) for name, module in projections.items()},
        compressor.looks_at,
        gathered,
    )
    found = decompose(
        evidence,
        compressor,
        settings.layout,
        lambda name: layer_of(view, name),
        lambda name: projections[name]._parameters.get("bias") is not None,
        say,
    )
    places = {name: place for place, name in enumerate(projections)}
    return sorted(found, key=lambda one: places[one.priced.name])


def layer_of(view: ModelView, name: str) -> int:
    """Returns the index of the decoder layer that a projection is in."""
    return int(name.removeprefix(f"{view.family.layers}.").partition(".")[0])


def saved_moments(settings: CompressSettings, fingerprint: str, windows: Tensor | None, seed: int) -> SavedMoments | None:
    """Returns the folder of the model's moments on the calibration windows; None where the user asked for none.

    Raises:
        OutputError: The path of the cache is a file.
    """
    if settings.cache is None or windows is None:
        return None
    return SavedMoments(settings.cache, {"fingerprint": fingerprint, "windows_sha256": checksum_of(windows)}, seed)


def space_of(loaded: Loaded, found: list[Decomposed], compressor: Compressor, settings: CompressSettings, ratio: float) -> FactorSpace:
    """Returns the ranks of the decomposed layers, with their prices, under a share of the model's parameters to remove."""
    return factor_space(
        [one.priced for one in found],
        fingerprint=loaded.fingerprint,
        method=compressor.name,
        unit="nats" if compressor.unit == "nats" else "share",
        layout=settings.layout,
        parameters=parameter_count(loaded.model),
        ratio=ratio,
        align=settings.align if isinstance(settings.align, int) else None,
    )


def plan_from_ranks(
    ranks: RankPlan, found: Sequence[Decomposed], fingerprint: str, parameters: int, settings: CompressSettings
) -> FactorPlan:
    """Returns the factors' plan of a rank plan: layers that it does not name, or gives rank 0, stay dense.

    Args:
        ranks: The rank plan.
        found: The decomposed layers.
        fingerprint: Fingerprint of the model.
        parameters: All parameters of the model.
        settings: The layout.

    Raises:
        PlanError: It names no layer of the model, or a rank that saves nothing.
    """
    sites = {one.priced.name: one for one in found}
    saved, entries = 0, list[Factoring]()
    for name, rank in ranks.ranks.items():
        if name not in sites:
            raise PlanError(f"the rank plan names '{name}', which is no linear layer of this model; make the plan for this model")
        priced = sites[name].priced
        if not rank:
            continue
        dense = priced.rows * priced.columns
        stored = stored_numbers(priced.rows, priced.columns, rank, settings.layout) + priced.new_bias
        if rank < 0 or stored >= dense:
            raise PlanError(f"rank {rank} of '{name}' ({priced.rows} x {priced.columns}) stores {stored:,} of {dense:,} numbers; lower it")
        saved += dense - stored
        one = sites[name]
        entries.append(Factoring(name, rank, one.has_bias or one.truncation.mean_I is not None))
    if not entries:
        raise PlanError("the rank plan gives no layer a rank; give at least one layer a rank of 1 or more")
    order = {name: place for place, name in enumerate(sites)}
    entries.sort(key=lambda entry: order[entry.module])
    ratio = saved / parameters
    made_with = {"rank_plan": ranks.method, "settings": settings.decisive()}
    after = parameters - saved
    return FactorPlan(fingerprint, "pc_lora", "rank plan", settings.layout, ratio, parameters, after, tuple(entries), None, made_with)


def moved_plan(loaded: Loaded, plan: FactorPlan) -> FactorPlan:
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
    check_factor_plan(loaded.model, moved, loaded.fingerprint)
    return moved
