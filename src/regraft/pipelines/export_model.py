"""Export a model: write it in the form of another program, compare it there, and only then give it its name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from regraft.atomic import atomic_folder
from regraft.data.own_text import write_own_text
from regraft.data.text import Corpus, read_corpus
from regraft.data.tokens import context_limit
from regraft.errors import DataError, MissingDependencyError, ModelError, RegraftError
from regraft.export import EXPORTERS, ModelFormat, Parity, Written
from regraft.export.parity import CHARACTERS, mixed_text
from regraft.models.card import loading_section, model_card, sizes_section
from regraft.models.checks import check_finite
from regraft.models.folder import write_folder
from regraft.models.load import Loaded
from regraft.models.precision import float32_on_cpu
from regraft.models.provenance import parents_of, versions
from regraft.models.view import ModelView
from regraft.pipelines.texts import Texts, made_from_seedling, read
from regraft.plans import Provenance
from regraft.settings import ExportSettings

PROBE_CHARACTERS = 20_000
OWN_WINDOWS, OWN_TOKENS = 4, 128


@dataclass(frozen=True)
class ModelExport:
    """Result of writing a model.

    Attributes:
        words: What was written, in a few words.
        notes: What the user should know, as sentences without a full stop.
        parity: Comparison in its runtime; None where that was not asked for.
    """

    words: str
    notes: tuple[str, ...] = ()
    parity: Parity | None = None


def export_loaded(
    loaded: Loaded,
    output: Path,
    to: str,
    form: ModelFormat,
    settings: ExportSettings,
    *,
    check: str | None = "",
    command: str = "regraft.export",
) -> ModelExport:
    """Writes a model that is in memory.

    Args:
        loaded: The model with its tokenizer; it is left as it is.
        output: A folder to write.
        to: Name of the format, for the record.
        form: The format.
        settings: How it is written.
        check: The text of the comparison: a file, the text itself, or empty for :func:`standing_text`; None for no comparison.
        command: How this was called, for the record.

    Raises:
        InputError: The format cannot hold the model.
        ModelError: The model holds NaN.
        OutputError: The output exists or cannot be written, or the exported model computes something else.
    """
    check_finite(loaded.model, loaded.source)
    if not form.takes_factors:
        refuse_factors(loaded, to)
    form.refuse(loaded, settings)
    text, remarks = None, ()
    if check is not None:
        text, remarks = (check_text(check), ()) if check else standing_text(loaded)
    with atomic_folder(output) as partial:
        written = form.write(loaded, partial, settings)
        parity = form.check(loaded, partial, written, text, settings) if text is not None else None
        finish(loaded, partial, to, settings, written, parity, command)
    return ModelExport(written.words, (*written.notes, *remarks), parity)


def takes(to: str, loaded: Loaded) -> bool:
    """Returns whether a format holds a model, as far as can be said before it is written.

    Args:
        to: Name of a format for whole models.
        loaded: The model with its tokenizer.
    """
    form = EXPORTERS.get(to)
    assert isinstance(form, ModelFormat)
    try:
        form.refuse(loaded, ExportSettings())
    except MissingDependencyError:  # once it is installed
        return True
    except RegraftError:
        return False
    return True


def finish(loaded: Loaded, partial: Path, to: str, settings: ExportSettings, written: Written, parity: Parity | None, command: str) -> None:
    """Writes the record and the card of an export into its folder."""
    provenance = Provenance(
        command=command,
        source=loaded.source,
        source_fingerprint=loaded.fingerprint,
        seed=0,
        versions=versions(),
        settings={
            "to": to,
            **settings.model_dump(mode="json"),
            **written.facts,
            **({"parity": dataclasses.asdict(parity)} if parity else {}),
        },
        parents=parents_of(loaded.provenance),
    )
    write_folder(partial, provenance, _card(loaded, provenance, written.words, parity, partial), written.files)


def refuse_factors(loaded: Loaded, to: str) -> None:
    """Refuses a model with factored layers, for a format without a place for them.

    Raises:
        ModelError: The model has such layers.
    """
    factored = ModelView(loaded.model).factored()
    if factored:
        raise ModelError(
            f"'{loaded.source}' stores {len(factored)} layers as two factors, such as '{next(iter(factored))}', and format {to} has no "
            "place for these; export with `to=hf`, or write dense matrices with "
            "`regraft compress MODEL --dense --method svd_llm`, which adds no bias"
        )


def _card(loaded: Loaded, provenance: Provenance, words: str, parity: Parity | None, folder: Path) -> str:
    view = ModelView(loaded.model)
    facts = {"format": words, "comparison": parity.words() if parity else "not made"}
    sections = [model_card(provenance, facts), sizes_section([view.sizes(index) for index in range(len(view.layers))])]
    if (folder / "config.json").is_file() and not any(folder.glob("configuration_decilm.py")):
        uneven = any(folder.glob("modeling_regraft.py"))
        sections.append(loading_section("causal language model" if uneven else "model of a stock class", uneven=uneven))
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def standing_text(loaded: Loaded) -> tuple[str, tuple[str, ...]]:
    """Returns the text of a comparison for which none was given, and a remark that says what it is.

    For seedling and models made from it this is built-in text, and goes without a remark. Any other model writes the text itself, which is
    like what it is used for: on characters of all kinds the divergence of a correct 4-bit file is several times what it is on such text.
    Only a model without a tokenizer, or one whose words are not read back, gets such mixed characters.
    """
    if made_from_seedling(loaded.source, loaded.provenance):
        return "\n\n".join(read_corpus(None, "test").documents)[:PROBE_CHARACTERS], ()
    ask = "; `check` takes text like that which the model is to work on"
    if loaded.tokenizer is not None:
        tokens = min(OWN_TOKENS, context_limit(loaded.model.config) or OWN_TOKENS)
        with float32_on_cpu(loaded.model):
            own = write_own_text(loaded.model, loaded.tokenizer, OWN_WINDOWS, tokens, seed=0)
        text = "\n\n".join(loaded.tokenizer.batch_decode(own.windows_NT, skip_special_tokens=True))
        if len(loaded.tokenizer(text, verbose=False).input_ids) >= tokens:
            return text, (f"no text was given for the comparison, so both programs read text that the model wrote itself{ask}",)
    return mixed_text((), CHARACTERS), (f"no text was given for the comparison, so both programs read characters of many kinds{ask}",)


def to_compare(given: Texts | None) -> str | None:
    """Returns what a user gave for the comparison as the name of a file or the text itself; nothing as it is.

    Raises:
        DataError: It is something else than text, texts or a data set.
    """
    match given:
        case None | str():
            return given
        case Path():
            return str(given)
        case _:
            return _joined(read(given, "test", "check"))


def check_text(given: str) -> str:
    """Returns the text of a comparison.

    Args:
        given: Name of a text file, or the text itself.

    Raises:
        DataError: The file cannot be read, or is a folder.
    """
    path = Path(given) if len(given) < 1000 and "\n" not in given else None
    try:
        is_file, is_folder = path is not None and path.is_file(), path is not None and path.is_dir()
    except OSError:  # a text longer than a file name may be
        is_file, is_folder = False, False
    if is_folder:
        raise DataError(f"'{given}' is a folder; give a text file, or the text itself")
    if not is_file:
        if path is not None and path.suffix in (".txt", ".jsonl", ".json"):
            raise DataError(f"there is no file '{given}'; give a text file, or the text itself")
        return given
    return _joined(read_corpus(Path(given), "test"))


def _joined(corpus: Corpus) -> str:
    """Returns the first texts of a corpus, or the first answers of its records, as one text."""
    return "\n\n".join(corpus.documents or tuple(record.output for record in corpus.records))[:PROBE_CHARACTERS]
