"""The text that a stage reads: a file, texts or records in memory, a data set with a text column, or the one that comes with seedling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized
from pathlib import Path
from typing import Any, cast

from regraft import seedling
from regraft.data.text import Corpus, Split, corpus_of, read_corpus
from regraft.errors import DataError, kind_of
from regraft.models.load import SEEDLING, Loaded
from regraft.models.provenance import read_provenance
from regraft.plans import Provenance
from regraft.reading import is_there, text_in

MOST_STREAMED_ROWS = 10**6  # of a generator or a streamed data set, all of which is read

_LONGEST_NAME_BYTES = 255  # of one part of a path, on all file systems in use

# Tables that give their columns when they are iterated over, and how each gives its rows; none of these packages is imported for this.
_ROWS_OF: Mapping[tuple[str, str], Callable[[Any], Any]] = {
    ("pandas", "DataFrame"): lambda table: table.to_dict("records"),
    ("polars", "DataFrame"): lambda table: table.to_dicts(),
    ("pyarrow", "Table"): lambda table: table.to_pylist(),
}

Texts = str | Path | Iterable[str] | Iterable[Mapping[str, Any]]
"""What every call takes for text: a file, or texts, or records as files hold them; a ``datasets.Dataset`` is the last of these."""


def text_for(loaded: Loaded, given: Texts | None, split: Split, setting: str) -> Corpus:
    """Returns the text that a stage reads.

    Args:
        loaded: The model that it is for.
        given: What the user gave; None for the text that comes with seedling.
        split: Split of seedling's text.
        setting: What the user calls it, such as ``calibration``.

    Raises:
        DataError: Nothing was given, and the model is not seedling or made from it; or what was given cannot be used.
    """
    if given is not None:
        return read(given, split, setting)
    if not made_from_seedling(loaded.source, loaded.provenance):
        raise DataError(
            f"`{setting}` is missing: only {SEEDLING} has text of its own, not '{loaded.source}'; give text like that which it is to "
            "work on: a file (.txt, .jsonl, .json, .csv, .tsv), a data set (hf:NAME), or texts in memory"
        )
    return read_corpus(None, split)


def read(given: Texts, split: Split, setting: str, *, skip_bad: bool = False) -> Corpus:
    """Returns a file's text, or what was given in memory.

    Raises:
        DataError: It cannot be used: a mapping of splits, a data set without a text column, nothing at all, another type.
    """
    values: Any = given  # callers without a type checker pass anything
    match values:
        case str() | Path():
            return read_corpus(values, split, skip_bad=skip_bad)
        case Mapping():
            known, first = ", ".join(map(repr, list(values)[:4])), next(iter(values), "train")
            raise DataError(f"`{setting}` is {kind_of(values)} of {known}; give one part of it, such as `{setting}`[{first!r}]")
        case _ if (rows_of := _ROWS_OF.get((type(values).__module__.partition(".")[0], type(values).__name__))) is not None:
            return read(rows_of(values), split, setting, skip_bad=skip_bad)
        case Set():
            raise DataError(f"`{setting}` is {kind_of(values)}, which has another order each time; give a list")
        case Iterable() if not isinstance(values, bytes | bytearray | memoryview):
            rows = ((f"row {number}", _row(value)) for number, value in enumerate(_counted(values, f"`{setting}`"), 1))
            return corpus_of(setting, rows, skip_bad=skip_bad)
        case _:
            raise DataError(f"`{setting}` is {kind_of(values)}; give a file, texts, or a data set with a column 'text'")


def _counted(values: Iterable[Any], what: str) -> Iterator[Any]:
    """Yields what a stream gives, which may have no end; what knows its length is at hand already.

    Raises:
        DataError: It gives more rows than anybody waits for.
    """
    if isinstance(values, Sized):
        yield from values
        return
    for number, value in enumerate(values):
        if number >= MOST_STREAMED_ROWS:
            raise DataError(f"{what} is a stream of more than {MOST_STREAMED_ROWS:,} rows; give a part of it, such as STREAM.take(10_000)")
        yield value


def _row(value: Any) -> Any:
    """Returns an entry of a data set as a row; a plain text is the text of one."""
    return value if text_in(value) is None else {"text": value}


def path_in(given: Texts | None) -> Path | None:
    """Returns the file that was given, for the settings; None for nothing and for what is in memory.

    Raises:
        DataError: It is a text that is no name of a file.
    """
    match given:
        case str() if not is_there(Path(given)) and _is_prose(given):
            raise DataError(f"a text of {len(given):,} characters stands where the name of a file is read; give texts in a list: [TEXT]")
        case str() | Path():
            return Path(given)
        case _:
            return None


def _is_prose(text: str) -> bool:
    """Returns whether a text cannot be the name of a file, or of several."""
    return "\n" in text or any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME_BYTES for part in text.split("/"))


def in_memory(given: Texts | None) -> Texts | None:
    """Returns what was given where it is no file, so that it can be read more than once."""
    match given:
        case None | str() | Path():
            return None
        case Iterator():
            return cast(Texts, list(_counted(given, "the text")))
        case _:
            return given


def described(corpus: Corpus) -> dict[str, Any]:
    """Returns what a record says of text that was given in memory: how much it was, and its SHA-256."""
    digest = hashlib.sha256()
    for part in (*corpus.documents, *("\0".join(record.texts) for record in corpus.records)):
        digest.update(part.encode() + b"\0")
    return {"documents": len(corpus), "bytes": corpus.n_bytes, "sha256": digest.hexdigest()}


def made_from_seedling(source: str, provenance: Provenance | None) -> bool:
    """Returns whether a model is the embedded one, or was made from it, as far as its records say."""
    first = source
    if provenance is None and Path(source).is_dir():
        provenance = read_provenance(Path(source))  # of an adapter; of a model it is the one that was given
    if provenance is not None:
        first = str(provenance.parents[0]["source"]) if provenance.parents else provenance.source
    return first == SEEDLING or (Path(first).is_dir() and Path(first).resolve() == seedling.path().resolve())
