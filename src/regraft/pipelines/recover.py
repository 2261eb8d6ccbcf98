"""Recovery of a model: load, train an adapter on text or instructions, merge or keep it, save."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.adapters.contract import adapter_options
from regraft.atomic import atomic_folder, refuse_existing, sha256_of
from regraft.claims import WORK, claimed, remove, work_folder
from regraft.data.labelled import Labelled, read_labelled, split_labelled
from regraft.data.text import BUILT_IN, Corpus, split_corpus
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, ModelError, OutputError
from regraft.models.card import model_card
from regraft.models.classifier import classes_of, is_classifier, load_classifier, row_limit, save_classifier
from regraft.models.folder import FOUND_AT, write_folder
from regraft.models.live import ModelLike, fitting_tokenizer, lineage, plain, remember, take
from regraft.models.load import SEEDLING, Loaded, locate, require_tokenizer
from regraft.models.load import load as load_model
from regraft.models.places import where_it_may_be
from regraft.models.provenance import parents_of, read_provenance, versions
from regraft.models.save import save
from regraft.models.view import fingerprint
from regraft.pipelines.finished_recovery import LOSS_LOG as LOSS_LOG
from regraft.pipelines.finished_recovery import TIMINGS, TRAINED, read_finished
from regraft.pipelines.proved import prove_adapter, prove_model
from regraft.pipelines.ranks.pattern import pattern_of
from regraft.pipelines.results import Saving
from regraft.pipelines.texts import Texts, described, in_memory, path_in, read, text_for
from regraft.plans import LOSS_UNITS, Provenance
from regraft.progress import Say, say_nothing
from regraft.reading import is_folder, path_of
from regraft.settings import TRAINING_TOKENS, LoadSettings, RecoverSettings, takes_settings, with_keywords
from regraft.surgery.adapter_files import is_master
from regraft.surgery.adapter_folder import ADAPTER_WEIGHTS, attached, base_record, fingerprint_without, is_adapter
from regraft.surgery.adapters import Injected, adapter_config, continued, save_adapter
from regraft.training.batches import in_steps
from regraft.training.callbacks import log_csv
from regraft.training.checkpoint import checkpoints
from regraft.training.distill import Teacher
from regraft.training.distributed import is_main, join_processes, local_device, wait_for_all
from regraft.training.four_bit import import_bitsandbytes
from regraft.training.job import check_made_for, check_trackers, read_ranks
from regraft.training.labelled import judged
from regraft.training.recover import Recovered, recover

DENSE = "dense"
_BEGAN_WITH = ("data", "continued")  # keys of the record: texts in memory, and the adapter whose training went on


@dataclass(frozen=True, repr=False)
class RecoverResult(Saving):
    """Result of recovering a model.

    Attributes:
        recovered: The model, its loss log and figures.
        loaded: Tokenizer, source and fingerprint of the model it was made from.
        settings: Settings of the recovery, with the number of steps that were taken.
        record: How the result came to be, without the checksums of files.
        provenance: The record as it was written; None when nothing was saved.
        judged: For a task with labels: accuracy and macro F1, or Pearson's and Spearman's correlation and the root of the mean squared
            error, on the held-out rows. The best checkpoint was chosen by these rows, so test the model on others.
        finished_before: Whether the output was there already, whole and of the same settings, seed and source, so that it was only read.
    """

    recovered: Recovered
    loaded: Loaded
    settings: RecoverSettings
    record: Provenance
    provenance: Provenance | None
    judged: Mapping[str, float] = field(default_factory=dict[str, float])
    finished_before: bool = False

    @property
    def model(self) -> PreTrainedModel:
        """The recovered model: plain where the adapter was folded in, else with the adapter on it."""
        return cast(PreTrainedModel, self.recovered.model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, which recovery leaves as it is."""
        return self.loaded.tokenizer

    @property
    def report(self) -> dict[str, Any]:
        """Facts of the recovery for a reader, in words."""
        return facts(self.recovered, self.settings, self.record)

    def __repr__(self) -> str:
        """Returns the held-out loss before and after, in one line."""
        done = self.recovered
        before = "finished before, " if self.finished_before else ""
        return f"RecoverResult({before}held-out loss {done.first_loss:.4f} -> {done.best_loss:.4f}, {type(self.model).__name__})"

    def save_pretrained(self, folder: str | Path, *, replace: bool = False) -> Provenance:
        """Saves the model, or its adapter, with its card, its loss log and how it came to be.

        Args:
            folder: A new or empty folder: of a model where the adapter was folded in, else of an adapter.
            replace: Whether a folder that we wrote is replaced.

        Returns:
            The record as it was written.

        Raises:
            OutputError: It cannot be written; what was there before is untouched.
        """
        return _save(self.recovered, self.loaded, path_of(folder, "folder"), self.settings, self.record, replace=replace)


@takes_settings(RecoverSettings, LoadSettings)
def recover_model(
    model: ModelLike | PeftModel,
    output: str | Path | None = None,
    settings: RecoverSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Texts | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    in_place: bool = False,
    resume: bool = False,
    work: Path | None = None,
    command: str = "regraft.recover",
    say: Say = say_nothing,
    **keywords: Any,
) -> RecoverResult:
    """Trains an adapter on a model and saves the result.

    Checkpoints are kept in ``.NAME.regraft`` next to the output until it is saved. If several processes run (``accelerate launch``), all of
    them train and the first one saves.

    Args:
        model: A ``PreTrainedModel`` in memory, which is left as it is; a ``PeftModel``, or the folder of a LoRA of PEFT, which is trained
            on; or a folder, a hub id, or ``seedling``.
        output: A model folder when the adapter is folded in, else a PEFT adapter folder; None writes nothing.
        settings: Data, adapter and training.
        tokenizer: The tokenizer for a model in memory.
        data: Text, instruction records or chats to train on: a file, texts, or a data set.
        load: How a folder or hub id is loaded.
        seed: Seed for everything random.
        in_place: Whether a model in memory is itself trained, which saves the memory of a copy.
        resume: Go on from the checkpoints of a run that was stopped; with none there, begin. An output that holds already what this call
            would write is success: it is read, and the result says so by ``finished_before``.
        work: Folder for checkpoints, in place of one next to the output; the caller removes it.
        command: How this was called, for the folder's record.
        say: Called with one line at each step of progress, unless ``quiet`` is set.
        **keywords: Single settings by name, such as ``rank=8``; they count before those in ``settings`` and ``load``.

    Raises:
        OutputError: The output exists, or there are checkpoints of an unfinished run and ``resume`` is False.
        RegraftError: Anything else that the user can mend, in one line.
    """
    chosen, load = with_keywords(command, keywords, settings or RecoverSettings(), load or LoadSettings())
    load = load.model_copy(update={"device": local_device(load.device)})
    if data is not None:
        chosen = chosen.model_copy(update={"data": path_in(data)})
    output = Path(output) if output is not None else None
    _check_early(chosen)
    order = _Order(model, tokenizer, in_memory(data), chosen, load, seed, in_place, resume, command, say_nothing if chosen.quiet else say)
    if resume and output is not None and work is None:
        prepared = _prepared_before(order, output)
        if prepared is not None:
            return _read_again(output, prepared, load)
    given = order.texts if order.texts is not None else chosen.data
    with _work_folder(output, work, resume=resume, data=lambda: training_rows(chosen, seed, given) if given is not None else None) as kept:
        result = _carry_out(order, kept)
        if output is not None and is_main():
            order.say("saving the result, and reading it again to compare")
            result = dataclasses.replace(result, provenance=result.save_pretrained(output))
    return result


@dataclass(frozen=True)
class _Order:
    """Order of one call; the fields are the parameters of :func:`recover_model`."""

    model: ModelLike | PeftModel
    tokenizer: PreTrainedTokenizerBase | None
    texts: Texts | None
    settings: RecoverSettings
    load: LoadSettings
    seed: int
    in_place: bool
    resume: bool
    command: str
    say: Say


def _carry_out(order: _Order, work: Path) -> RecoverResult:
    """Trains, with the checkpoints in a folder."""
    seed = order.seed
    settings, loaded, injected, corpora = _prepared(order)
    began_with = _began_with(order.model, corpora, order.texts)
    teacher = load_teacher(settings, order.load, loaded)
    done = recover(
        loaded.model,
        require_tokenizer(loaded),
        *corpora,
        settings,
        seed=seed,
        work=work,
        resume=order.resume,
        teacher=teacher,
        injected=injected,
        say=order.say,
    )
    return _result(done, loaded, settings, corpora, began_with, seed=seed, command=order.command)


Prepared = tuple[RecoverSettings, Loaded, Injected | None, tuple[Corpus, Corpus] | tuple[Labelled, Labelled]]


def _prepared_before(order: _Order, output: Path) -> Prepared | None:
    """Returns what :func:`recover_model` would begin with if its output holds already what it would write, and None otherwise.

    Only the name of a data file is compared, as the record of the output holds no more. What a killed run left beside it is removed.

    Raises:
        OutputError: Another process is writing this output.
        RegraftError: Anything else that the user can mend, in one line.
    """
    record = read_provenance(output) if is_folder(output) else None
    if record is None or "recover" not in record.settings or record.seed != order.seed:
        return None
    if not record.files or any(not (output / name).is_file() or sha256_of(output / name) != sha for name, sha in record.files.items()):
        return None
    prepared = _prepared(dataclasses.replace(order, in_place=False))
    decided, loaded, _, corpora = prepared
    wanted = decided.model_dump(mode="json", exclude={"quiet"}), loaded.fingerprint, _began_with(order.model, corpora, order.texts)
    written = {name: value for name, value in record.settings["recover"].items() if name != "quiet"}
    if (written, record.source_fingerprint, {name: record.settings[name] for name in _BEGAN_WITH if name in record.settings}) != wanted:
        return None
    if is_main():
        with claimed(output) as aside:
            remove(aside / WORK)
    return prepared


def _read_again(output: Path, prepared: Prepared, load: LoadSettings) -> RecoverResult:
    """Returns the result of a recovery from the folder that it was saved to."""
    settings, loaded, _, corpora = prepared
    record = read_provenance(output)
    assert record is not None
    classes = corpora[1].classes if isinstance(corpora[1], Labelled) else None
    done = read_finished(output, record, settings, load, classes)
    return RecoverResult(done, loaded, settings, record, record, _judged(done, loaded, corpora[1], settings), finished_before=True)


def _prepared(order: _Order) -> Prepared:
    """Returns settings with everything decided, the model with the adapter that it carries, training data and held-out data."""
    settings, seed = order.settings, order.seed
    if settings.ranks is not None:  # a record holds the plan, wherever its file lies
        settings = settings.model_copy(update={"ranks": read_ranks(settings.ranks)})
    given = order.texts if order.texts is not None else settings.data
    order.say("reading the data")
    corpora = training_rows(settings, seed, given) if given is not None or settings.task != "language" else None
    order.say("loading the model")
    loaded, injected = _student(order.model, order.tokenizer, corpora, settings, order.load, seed=seed, in_place=order.in_place)
    check_made_for(settings.ranks, loaded.fingerprint)
    if corpora is None:
        corpora = built_in_rows(loaded)
    if injected is not None:
        settings = _continuing(settings, injected)
    elif settings.ranks is None:
        settings = settings.model_copy(update={"ranks": pattern_of(settings, loaded)})
    if settings.epochs is not None:
        join_processes(loaded.model.device)  # a step is of rows of all processes
    return in_steps(settings, corpora[0], require_tokenizer(loaded), loaded.model, seed), loaded, injected, corpora


def _student(
    model: ModelLike | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpora: tuple[Corpus, Corpus] | tuple[Labelled, Labelled] | None,
    settings: RecoverSettings,
    load: LoadSettings,
    *,
    seed: int,
    in_place: bool,
) -> tuple[Loaded, Injected | None]:
    """Returns the model that is trained, and the adapter that it carries already."""
    match model, corpora:
        case str() | Path(), _ if in_place:
            raise InputError("`in_place` is for a model in memory; leave it out for a folder, and say with `output` where the result goes")
        case str() | Path(), (_, Labelled(classes=classes)):
            return load_classifier(model, classes, load, seed=seed), None
        case str() | Path(), _ if is_adapter(model) and not is_master(Path(model)):
            base, adapted = attached(Path(model), load)
            return base, continued(cast(PeftModel, adapted))
        case str() | Path(), _:
            return take(model, tokenizer, load), None
        case _, (_, Labelled()):
            raise InputError(f"`task={settings.task}` makes a head for labels as it loads a model; give a folder or a hub id")
        case Loaded(), _:
            return model, None
        case PeftModel(), _:
            found = lineage(plain(model))
            injected = continued(model if in_place else copy.deepcopy(model))
            remember(injected.model, found.provenance)
            fitting = fitting_tokenizer(tokenizer, injected.model)
            return Loaded(injected.model, fitting, found.source, fingerprint_without(injected.model), found.provenance), injected
        case _:
            loaded = take(model, tokenizer)
            if in_place:
                return loaded, None
            return dataclasses.replace(loaded, model=remember(copy.deepcopy(loaded.model), loaded.provenance)), None


def _continuing(settings: RecoverSettings, injected: Injected) -> RecoverSettings:
    """Returns the settings of training an adapter further: its own rank, alpha and dropout, and merging only if asked for.

    Raises:
        InputError: They say something of the adapter, which is there already.
    """
    of_the_adapter = {"adapter", "rank", "alpha", "ranks", "rank_pattern", "targets", "dropout", "adapter_options", "load_in_4bit"}
    said = sorted(of_the_adapter & settings.model_fields_set)
    if said:
        raise InputError(f"`{said[0]}` is that of the adapter which the model carries; leave it out, or give the model without an adapter")
    own = adapter_config(injected)
    merge = settings.merge and "merge" in settings.model_fields_set
    dropout = float(own.lora_dropout)
    return settings.model_copy(update={"rank": own.r, "alpha": float(own.lora_alpha), "dropout": dropout, "merge": merge})


def _result(
    done: Recovered,
    loaded: Loaded,
    settings: RecoverSettings,
    corpora: tuple[Corpus, Corpus] | tuple[Labelled, Labelled],
    began_with: Mapping[str, Any],
    *,
    seed: int,
    command: str,
) -> RecoverResult:
    """Returns the result with its record, and what was found on held-out rows with labels."""
    model = cast(PreTrainedModel, done.model) if done.injected is None else done.injected.model
    classes = {"classes": list(classes_of(model))} if is_classifier(model) else {}
    record = Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=seed,
        versions=versions(),
        ranks=done.ranks,
        settings={"recover": settings.model_dump(mode="json"), **classes, **began_with, **_counted(done)},
        parents=parents_of(loaded.provenance),
    )
    if done.injected is None:  # an adapter that stays lies on the model that it was trained on, whose record is that of before
        remember(done.model, record)
    return RecoverResult(done, loaded, settings, record, None, _judged(done, loaded, corpora[1], settings))


def _judged(done: Recovered, loaded: Loaded, held_out: Corpus | Labelled, settings: RecoverSettings) -> dict[str, float]:
    """Returns what was found on held-out rows with labels; nothing of text."""
    if not isinstance(held_out, Labelled):
        return {}
    most_tokens = window_tokens(settings.seq_len, TRAINING_TOKENS, loaded.model.config, "seq_len", row_limit(loaded.model))
    return judged(cast(PreTrainedModel, done.model), require_tokenizer(loaded), held_out, most_tokens)


def _began_with(
    model: ModelLike | PeftModel, corpora: tuple[Corpus, Corpus] | tuple[Labelled, Labelled], texts: Texts | None
) -> dict[str, Any]:
    """Returns, for the record, what a recovery began with besides its settings: texts in memory, and an adapter that it goes on with."""
    found: dict[str, Any] = {}
    if texts is not None and isinstance(corpora[0], Corpus):
        found["data"] = described(corpora[0])
    if isinstance(model, str | Path) and is_adapter(model):
        found["continued"] = {"adapter": str(model), "sha256": sha256_of(Path(model) / ADAPTER_WEIGHTS)}
    elif isinstance(model, PeftModel):
        base = cast(PreTrainedModel, model.get_base_model())
        found["continued"] = {"adapter": "in memory", "fingerprint": fingerprint(base)}
    return found


def _counted(done: Recovered) -> dict[str, Any]:
    """Returns, for the record, the learning rates that were tried, and counts: of parameters, instruction records and skipped rows."""
    data = done.data
    records = {} if data.records is None else {"records": dataclasses.asdict(data.records)}
    rates = {} if done.rates is None else {"rates": dataclasses.asdict(done.rates)}
    return {TRAINED: done.trainable_parameters} | records | rates | ({"skipped_rows": data.skipped.rows} if data.skipped.rows else {})


def load_teacher(settings: RecoverSettings, load: LoadSettings, pruned: Loaded) -> Teacher | None:
    """Loads the teacher, if the settings name one.

    Args:
        settings: Settings with the teacher's name; ``dense`` is the model before pruning, which is looked for by the name that it had,
            beside the pruned one, and where it lay then.
        load: Settings for loading the teacher.
        pruned: The model that is to learn.

    Raises:
        InputError: The name is ``dense`` and the model before pruning is not known.
        ModelError: The teacher cannot be loaded.
    """
    if settings.teacher is None:
        return None
    if settings.teacher != DENSE:
        loaded = load_model(settings.teacher, load)
        return Teacher(loaded.model, settings.teacher, loaded.tokenizer, loaded.fingerprint)
    before = pruned.provenance
    if before is None:
        raise InputError("`teacher=dense`: the model's folder does not say what it was pruned from; name the teacher itself")
    folder = Path(pruned.source) if is_folder(Path(pruned.source)) else None
    places = where_it_may_be(before.source, folder, before.settings.get(FOUND_AT))
    try:
        candidates = [load_model(place, load) for place in places]
    except ModelError as error:
        raise ModelError(f"`teacher=dense`, the model before pruning: {error}; or name its folder with `teacher`") from None
    chosen = next((one for one in candidates if one.fingerprint == before.source_fingerprint), candidates[0])
    return Teacher(chosen.model, before.source, chosen.tokenizer, chosen.fingerprint)


def training_rows(settings: RecoverSettings, seed: int, given: Texts | None) -> tuple[Corpus, Corpus] | tuple[Labelled, Labelled]:
    """Returns training data and held-out data for any task.

    Raises:
        DataError: The file cannot be used.
        InputError: A task with labels has no data, or has settings that only language modelling supports.
    """
    if settings.task == "language":
        assert given is not None
        return split_corpus(read(given, "train", "data", skip_bad=settings.skip_bad), settings.held_out, seed)
    if settings.data is None:
        raise InputError(f"`task={settings.task}` needs texts with labels; give the file with `data`")
    if settings.teacher is not None or settings.packing:
        raise InputError(f"`task={settings.task}` knows neither `teacher` nor `packing`; leave them out")
    rows = read_labelled(settings.data, settings.task, settings.text_columns, settings.label_column)
    return split_labelled(rows, settings.held_out, seed)


def training_corpora(settings: RecoverSettings, seed: int, loaded: Loaded) -> tuple[Corpus, Corpus]:
    """Reads text to train on and text that is held out: of a file a share, of the text that comes with seedling its own splits.

    Raises:
        DataError: The file cannot be used, or there is none and the model is not seedling or made from it.
        InputError: The task has labels.
    """
    if settings.task != "language":
        raise InputError(f"`task={settings.task}` has labels, which searches for ranks do not learn; use: regraft recover")
    if settings.data is None:
        return built_in_rows(loaded)
    return split_corpus(read(settings.data, "train", "data"), settings.held_out, seed)


def built_in_rows(loaded: Loaded) -> tuple[Corpus, Corpus]:
    """Returns the text that comes with seedling, to train on and to hold out.

    Raises:
        DataError: The model is not seedling or made from it.
    """
    return text_for(loaded, None, "train", "data"), text_for(loaded, None, "validation", "data")


def _save(
    recovered: Recovered, loaded: Loaded, output: Path, settings: RecoverSettings, record: Provenance, *, replace: bool
) -> Provenance:
    """Writes a model folder where the adapter was folded in, else the folder of an adapter."""
    model = cast(PreTrainedModel, recovered.model) if recovered.injected is None else recovered.injected.model
    card = model_card(record, facts(recovered, settings, record))
    with atomic_folder(output, replace=replace) as partial:
        if recovered.injected is None:
            keep = save_classifier if is_classifier(model) else save
            written = keep(model, loaded.tokenizer, partial, record, card)
            if recovered.trained is not None:
                prove_model(partial, model, recovered.trained)
        else:
            base = str(locate(SEEDLING)) if loaded.source == SEEDLING else loaded.source
            save_adapter(recovered.injected, partial, base)
            card = _adapter_card(card, base, own=is_master(partial), model_class=_auto_class(model))
            record = dataclasses.replace(record, settings={**record.settings, "base": base_record(base, loaded, output)})
            written = write_folder(partial, record, card)
            if recovered.trained is not None:
                prove_adapter(partial, loaded, recovered.trained)
        (partial / LOSS_LOG).write_text(log_csv(recovered.log), encoding="utf-8")
        (partial / TIMINGS).write_text(_timings(recovered), encoding="utf-8")
    return written


def facts(recovered: Recovered, settings: RecoverSettings, record: Provenance) -> dict[str, Any]:
    """Returns the facts about a recovery for a model card, in words."""
    ranks = f"rank {settings.rank}" if recovered.ranks is None else f"ranks by {recovered.ranks.method}"
    taught = f", taught by {settings.teacher} ({settings.distill:g} of the loss)" if settings.teacher else ""
    state = "folded into the weights" if recovered.injected is None else "kept beside the weights"
    return {
        "recovered with": f"{settings.adapter}, {ranks}, {state}{taught}",
        "trained parameters": f"{recovered.trainable_parameters:,}",
        "data": str(settings.data) if settings.data else "texts in memory" if "data" in record.settings else BUILT_IN,
        **({"rows of data": "; ".join(recovered.data.lines())} if recovered.data.lines() else {}),
        **({"learning rate": str(recovered.rates)} if recovered.rates is not None else {}),
        "steps": f"{settings.steps} of {settings.batch * settings.accumulate} windows of up to {settings.seq_len or TRAINING_TOKENS}",
        "held-out loss": f"{recovered.first_loss:.4f} to {recovered.best_loss:.4f} {LOSS_UNITS[settings.task]} "
        f"(step {recovered.best_step})",
    }


def _auto_class(model: PreTrainedModel) -> str:
    return "AutoModelForSequenceClassification" if is_classifier(model) else "AutoModelForCausalLM"


def _adapter_card(card: str, base: str, model_class: str, *, own: bool) -> str:
    """Turns the card of a model into the card of an adapter of regraft or PEFT."""
    if own:
        what = "It is a compact adapter of regraft: `regraft evaluate FOLDER` measures it on its base,"
        ways = "`regraft export FOLDER --to peft-lora --output DIR` writes what PEFT loads, "
        ways += "`regraft export FOLDER --to merged --output DIR` the model with it folded in."
        how = "\n".join(["## How to load it", "", what, ways, ""])
        return card.replace("library_name: transformers", "library_name: regraft", 1).rstrip() + "\n\n" + how
    lines = [
        "from peft import PeftModel",
        f"from transformers import {model_class}",
        "",
        f"model = {model_class}.from_pretrained({base!r})  # `import regraft` first if its layers differ in size",
        "model = PeftModel.from_pretrained(model, FOLDER)",
    ]
    how = "\n".join(["## How to load it", "", "It is a plain PEFT adapter.", "", "```python", *lines, "```", ""])
    return card.replace("library_name: transformers", "library_name: peft", 1).rstrip() + "\n\n" + how


def _timings(recovered: Recovered) -> str:
    """Returns the values that differ from run to run, in a separate file, so that all other files have equal bytes."""
    values = {
        "seconds": round(recovered.seconds, 3),
        "peak_memory_bytes": recovered.peak_memory_bytes,
        "log": [{"step": row.step, "seconds": row.seconds} for row in recovered.log],
    }
    return json.dumps(values, indent=1) + "\n"


def _check_early(settings: RecoverSettings) -> None:
    """Checks the settings that need no model, before one is loaded."""
    adapter_options(settings)
    check_trackers(settings.report_to)
    read_ranks(settings.ranks)
    if settings.load_in_4bit:
        import_bitsandbytes()


@contextmanager
def _work_folder(output: Path | None, work: Path | None, *, resume: bool, data: Callable[[], object]) -> Iterator[Path]:
    """Opens the folder of the checkpoints, which is kept only if the block fails after a checkpoint was written.

    Args:
        output: What is written; None for nothing.
        work: The folder, where the caller has one.
        resume: Whether to go on with an unfinished run.
        data: Reads the training data; called where an unfinished run is refused, so that data that cannot be read are said first.

    Raises:
        OutputError: The output exists, or there is an unfinished run and ``resume`` is False.
    """
    if work is not None:
        yield work
        return
    if output is None:
        with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
            yield Path(folder) / "work"
        return
    refuse_existing(output)
    with claimed(output) if is_main() else nullcontext(work_folder(output)) as aside:
        work = aside / WORK
        unfinished = checkpoints(work)
        if unfinished and not resume:
            data()
            step = unfinished[-1].name.rpartition("-")[2]
            raise OutputError(
                f"a run to '{output}' was stopped after step {step}; go on with `resume=True`, or remove '{aside}' to begin anew"
            )
        try:
            yield work
        except BaseException:
            if is_main() and not checkpoints(work):
                remove(work)
            raise
        wait_for_all()
        if is_main():
            remove(work)
