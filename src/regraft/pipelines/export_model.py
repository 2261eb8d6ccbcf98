"""Export a model: write it in the form of another program, compare it there, and only then give it its name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from regraft.atomic import atomic_folder, sha256_of
from regraft.data.text import read_corpus
from regraft.errors import DataError
from regraft.export import ModelFormat, Parity
from regraft.models.card import loading_section, model_card, sizes_section
from regraft.models.checks import check_finite
from regraft.models.load import Loaded
from regraft.models.provenance import FILE, parents_of, provenance_text, versions
from regraft.models.view import ModelView
from regraft.plans import Provenance
from regraft.settings import ExportSettings

PROBE_CHARACTERS = 20_000


@dataclass(frozen=True)
class ModelExport:
    """What was written.

    Attributes:
        words: In a few words.
        notes: What the user should know, as sentences without a full stop.
        parity: How it compares in its runtime; None where that was not asked for.
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
        check: The text of the comparison: a file, the text itself, or empty for the built-in text; None for no comparison.
        command: How this was called, for the record.

    Raises:
        InputError: The format cannot hold the model.
        ModelError: The model holds NaN.
        OutputError: The output exists or cannot be written, or the exported model computes something else.
    """
    check_finite(loaded.model, loaded.source)
    form.refuse(loaded, settings)
    text = None if check is None else check_text(check)
    with atomic_folder(output) as partial:
        written = form.write(loaded, partial, settings)
        parity = form.check(loaded, partial, written, text, settings) if text is not None else None
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
            files={file.name: sha256_of(file) for pattern in ("*.safetensors", "*.gguf") for file in sorted(partial.glob(pattern))},
            parents=parents_of(loaded.provenance),
        )
        (partial / FILE).write_text(provenance_text(provenance), encoding="utf-8")
        (partial / "README.md").write_text(_card(loaded, provenance, written.words, parity, partial), encoding="utf-8")
    return ModelExport(written.words, written.notes, parity)


def _card(loaded: Loaded, provenance: Provenance, words: str, parity: Parity | None, folder: Path) -> str:
    view = ModelView(loaded.model)
    facts = {"format": words, "comparison": parity.words() if parity else "not made"}
    sections = [model_card(provenance, facts), sizes_section([view.sizes(index) for index in range(len(view.layers))])]
    if (folder / "config.json").is_file() and not any(folder.glob("configuration_decilm.py")):
        uneven = any(folder.glob("modeling_regraft.py"))
        sections.append(loading_section("causal language model" if uneven else "model of a stock class", uneven=uneven))
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def check_text(given: str) -> str:
    """Returns the text of a comparison.

    Args:
        given: Name of a text file, the text itself, or empty for the built-in one.

    Raises:
        DataError: The file cannot be read.
    """
    if not given:
        return "\n\n".join(read_corpus(None, "test").documents)[:PROBE_CHARACTERS]
    path = Path(given) if len(given) < 1000 and "\n" not in given else None
    try:
        is_file = path is not None and path.is_file()
    except OSError:  # a text longer than a file name may be
        is_file = False
    if not is_file:
        if path is not None and path.suffix in (".txt", ".jsonl", ".json"):
            raise DataError(f"there is no file '{given}'; give a text file, or the text itself")
        return given
    corpus = read_corpus(Path(given), "test")
    return "\n\n".join(corpus.documents or tuple(record.output for record in corpus.records))[:PROBE_CHARACTERS]
