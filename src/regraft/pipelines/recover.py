"""Recover a model: load, train an adapter on text or instructions, fold it in or keep it, save."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from regraft.adapters.contract import adapter_options
from regraft.atomic import atomic_folder, refuse_existing, sha256_of
from regraft.claims import WORK, claimed, remove, work_folder
from regraft.data.labelled import Labelled, read_labelled, split_labelled
from regraft.data.text import Corpus, read_corpus, split_corpus
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, OutputError
from regraft.models.card import model_card
from regraft.models.classifier import classes_of, is_classifier, load_classifier, row_limit, save_classifier
from regraft.models.load import SEEDLING, Loaded, locate, require_tokenizer
from regraft.models.load import load as load_model
from regraft.models.provenance import FILE, parents_of, provenance_text, versions
from regraft.models.save import save
from regraft.plans import Provenance
from regraft.settings import TRAINING_TOKENS, LoadSettings, RecoverSettings
from regraft.surgery.adapter_files import is_master
from regraft.surgery.adapters import save_adapter
from regraft.training.callbacks import log_csv
from regraft.training.checkpoint import checkpoints
from regraft.training.distill import Teacher
from regraft.training.distributed import is_main, local_device, wait_for_all
from regraft.training.four_bit import import_bitsandbytes
from regraft.training.labelled import judged
from regraft.training.recover import Recovered, check_trackers, read_ranks, recover

LOSS_LOG = "training_log.csv"
TIMINGS = "timings.json"
DENSE = "dense"
UNITS = {"language": "nats a token", "classification": "nats a row", "regression": "squared error a row"}


@dataclass(frozen=True)
class RecoverResult:
    """What recovering a model gave.

    Attributes:
        recovered: The model, its loss log and figures.
        loaded: Tokenizer, source and fingerprint of the model it was made from.
        provenance: As it was written; None when nothing was saved.
        judged: Of a task with labels: accuracy and macro F1, or Pearson's and Spearman's correlation and the root of the mean squared
            error, on the held-out rows. They chose the best checkpoint, so keep rows of your own for the last word.
    """

    recovered: Recovered
    loaded: Loaded
    provenance: Provenance | None
    judged: Mapping[str, float] = field(default_factory=dict[str, float])


def recover_model(
    source: str | Path,
    output: str | Path | None = None,
    settings: RecoverSettings | None = None,
    *,
    load: LoadSettings | None = None,
    seed: int = 0,
    resume: bool = False,
    command: str = "regraft.recover",
) -> RecoverResult:
    """Trains an adapter on a model and saves the result.

    Checkpoints are kept in ``.NAME.regraft`` beside the output until it is saved. Of several processes, as ``accelerate launch`` starts
    them, all train and the first saves.

    Args:
        source: A folder, a hub id, or ``seedling``.
        output: A model folder when the adapter is folded in, else a PEFT adapter folder; None keeps the result in memory.
        settings: Data, adapter and training.
        load: How the model is loaded.
        seed: Of everything random.
        resume: Go on from the checkpoints of a run that was stopped; with none there, begin.
        command: How this was called, for the folder's record.

    Raises:
        OutputError: The output exists, or checkpoints of an unfinished run are there and ``resume`` is off.
        RegraftError: Anything else that the user can mend, in one line.
    """
    settings, load = settings or RecoverSettings(), load or LoadSettings()
    load = load.model_copy(update={"device": local_device(load.device)})
    output = Path(output) if output is not None else None
    _check_early(settings)
    with _work_folder(output, resume=resume) as work:
        corpora = training_rows(settings, seed)
        held_out = corpora[1]
        labelled = isinstance(held_out, Labelled)
        loaded = load_classifier(source, held_out.classes, load, seed=seed) if labelled else load_model(source, load)
        tokenizer = require_tokenizer(loaded)
        teacher = load_teacher(settings, load, loaded.provenance.source if loaded.provenance else None)
        recovered = recover(loaded.model, tokenizer, *corpora, settings, seed=seed, work=work, resume=resume, teacher=teacher)
        provenance = None
        if output is not None and is_main():
            provenance = save_recovered(recovered, loaded, output, settings, seed=seed, command=command)
        found: dict[str, float] = {}
        if labelled:
            most_tokens = window_tokens(settings.seq_len, TRAINING_TOKENS, loaded.model.config, "--seq-len", row_limit(loaded.model))
            found = judged(cast(PreTrainedModel, recovered.model), tokenizer, held_out, most_tokens)
    return RecoverResult(recovered, loaded, provenance, found)


def load_teacher(settings: RecoverSettings, load: LoadSettings, pruned_from: str | None) -> Teacher | None:
    """Loads the model to learn from, where the settings name one.

    Args:
        settings: The teacher's name; ``dense`` is the model that the student was pruned from.
        load: How it is loaded.
        pruned_from: That model, where it is known.

    Raises:
        InputError: The name is ``dense`` and nothing says which model that is.
        ModelError: It cannot be loaded.
    """
    if settings.teacher is None:
        return None
    if settings.teacher == DENSE and pruned_from is None:
        raise InputError("--teacher dense: the model's folder does not say what it was pruned from; name the teacher itself")
    name = pruned_from if settings.teacher == DENSE and pruned_from is not None else settings.teacher
    loaded = load_model(name, load)
    return Teacher(loaded.model, name, loaded.tokenizer, loaded.fingerprint)


def training_rows(settings: RecoverSettings, seed: int) -> tuple[Corpus, Corpus] | tuple[Labelled, Labelled]:
    """Reads what is trained on and what is held out, of any task.

    Raises:
        DataError: The file cannot be used.
        InputError: A task with labels has no data, or is asked for what only language has.
    """
    if settings.task == "language":
        return training_corpora(settings, seed)
    if settings.data is None:
        raise InputError(f"--task {settings.task} needs texts with labels; give them with --data FILE.csv")
    if settings.teacher is not None or settings.packing:
        raise InputError(f"--task {settings.task} knows neither --teacher nor --packing; leave them out")
    rows = read_labelled(settings.data, settings.task, settings.text_columns, settings.label_column)
    return split_labelled(rows, settings.held_out, seed)


def training_corpora(settings: RecoverSettings, seed: int) -> tuple[Corpus, Corpus]:
    """Reads what is trained on and what is held out: of a file a share, of the built-in text its own splits.

    Raises:
        DataError: The file cannot be used.
        InputError: The task has labels.
    """
    if settings.task != "language":
        raise InputError(f"task {settings.task} has labels, which recipes and rank searches do not learn; use: regraft recover")
    if settings.data is None:
        return read_corpus(None, "train"), read_corpus(None, "validation")
    return split_corpus(read_corpus(settings.data, "train"), settings.held_out, seed)


def save_recovered(
    recovered: Recovered,
    loaded: Loaded,
    output: Path,
    settings: RecoverSettings,
    *,
    seed: int,
    command: str,
    replace: bool = False,
) -> Provenance:
    """Saves a recovered model, or its adapter, with its card, its loss log and how it came to be.

    Args:
        recovered: From :func:`regraft.training.recover.recover`.
        loaded: The model that was trained.
        output: Where to: a model folder when the adapter was folded in, else a PEFT adapter folder.
        settings: Of the recovery.
        seed: Of the recovery.
        command: How it was called.
        replace: Whether an existing folder is replaced.

    Returns:
        The provenance as it was written.

    Raises:
        OutputError: It cannot be written; what was there before is untouched.
    """
    model = cast(PreTrainedModel, recovered.model) if recovered.injected is None else recovered.injected.model
    classes = {"classes": list(classes_of(model))} if is_classifier(model) else {}
    provenance = Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=seed,
        versions=versions(),
        ranks=recovered.ranks,
        settings={"recover": settings.model_dump(mode="json"), **classes},
        parents=parents_of(loaded.provenance),
    )
    card = model_card(provenance, facts(recovered, settings))
    with atomic_folder(output, replace=replace) as partial:
        if recovered.injected is None:
            keep = save_classifier if is_classifier(model) else save
            written = keep(model, loaded.tokenizer, partial, provenance, card)
        else:
            base = str(locate(SEEDLING)) if loaded.source == SEEDLING else loaded.source
            save_adapter(recovered.injected, partial, base)
            files = {file.name: sha256_of(file) for file in sorted(partial.glob("*.safetensors"))}
            written = dataclasses.replace(provenance, files=files)
            (partial / FILE).write_text(provenance_text(written), encoding="utf-8")
            (partial / "README.md").write_text(
                _adapter_card(card, base, own=is_master(partial), model_class=_auto_class(model)), encoding="utf-8"
            )
        (partial / LOSS_LOG).write_text(log_csv(recovered.log), encoding="utf-8")
        (partial / TIMINGS).write_text(_timings(recovered), encoding="utf-8")
    return written


def facts(recovered: Recovered, settings: RecoverSettings) -> dict[str, Any]:
    """Returns what a reader of a model card wants to know of a recovery, in words."""
    ranks = f"rank {settings.rank}" if recovered.ranks is None else f"ranks by {recovered.ranks.method}"
    taught = f", taught by {settings.teacher} ({settings.distill:g} of the loss)" if settings.teacher else ""
    state = "folded into the weights" if recovered.injected is None else "kept beside the weights"
    return {
        "recovered with": f"{settings.adapter}, {ranks}, {state}{taught}",
        "trained parameters": f"{recovered.trainable_parameters:,}",
        "data": str(settings.data) if settings.data else "the built-in text",
        "steps": f"{settings.steps} of {settings.batch * settings.accumulate} windows of up to {settings.seq_len or TRAINING_TOKENS}",
        "held-out loss": f"{recovered.first_loss:.4f} to {recovered.best_loss:.4f} {UNITS[settings.task]} (step {recovered.best_step})",
    }


def _auto_class(model: PreTrainedModel) -> str:
    return "AutoModelForSequenceClassification" if is_classifier(model) else "AutoModelForCausalLM"


def _adapter_card(card: str, base: str, model_class: str, *, own: bool) -> str:
    """Makes the card of a model that of an adapter, ours or PEFT's."""
    if own:
        what = "It is a compact adapter of regraft: `regraft evaluate FOLDER` measures it on its base,"
        ways = "`regraft export FOLDER --to peft-lora --output DIR` writes what PEFT loads, `--to merged` the model with it folded in."
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
    """Returns what differs from run to run, apart from the loss log, so that everything else is the same bytes."""
    values = {
        "seconds": round(recovered.seconds, 3),
        "peak_memory_bytes": recovered.peak_memory_bytes,
        "log": [{"step": row.step, "seconds": row.seconds} for row in recovered.log],
    }
    return json.dumps(values, indent=1) + "\n"


def _check_early(settings: RecoverSettings) -> None:
    """Checks what needs no model before one is loaded."""
    adapter_options(settings)
    check_trackers(settings.report_to)
    read_ranks(settings.ranks)
    if settings.load_in_4bit:
        import_bitsandbytes()


@contextmanager
def _work_folder(output: Path | None, *, resume: bool) -> Iterator[Path]:
    """Gives the folder of the checkpoints; it stays only when the block fails after a checkpoint was written.

    Raises:
        OutputError: The output exists, or an unfinished run is there and ``resume`` is off.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="regraft-") as folder:
            yield Path(folder) / "work"
        return
    refuse_existing(output)
    with claimed(output) if is_main() else nullcontext(work_folder(output)) as aside:
        work = aside / WORK
        unfinished = checkpoints(work)
        if unfinished and not resume:
            step = unfinished[-1].name.rpartition("-")[2]
            raise OutputError(f"a run to '{output}' was stopped after step {step}; go on with --resume, or remove '{aside}' to begin anew")
        try:
            yield work
        except BaseException:
            if is_main() and not checkpoints(work):
                remove(work)
            raise
        wait_for_all()
        if is_main():
            remove(work)
