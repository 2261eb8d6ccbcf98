"""Texts, instructions and chats: read from a file or a data set, checked, and divided into a used and a held-out part.

A source is ``.txt`` (documents separated by ``<|endoftext|>``, otherwise one document), ``.jsonl`` (an object on each line), ``.json`` (an
array of objects, or one object), ``.csv`` or ``.tsv`` (an object on each line, its keys on the first), ``.parquet``, a folder that
``datasets`` saved, or ``hf:NAME`` for a data set of the hub. :mod:`regraft.data.records` lists the forms of an object. All text is UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from regraft.data.hub import dataset_rows, is_dataset
from regraft.data.records import Record, entry_of
from regraft.errors import DataError, InputError
from regraft.reading import check_ordinary, path_of
from regraft.seedling import corpus as seedling_corpus

Split = Literal["train", "validation", "test"]

SEPARATOR = "<|endoftext|>"
TABLES = (".csv", ".tsv")
SUFFIXES = (".txt", ".jsonl", ".json", *TABLES)
BUILT_IN = "seedling's built-in text"


@dataclass(frozen=True)
class Skipped:
    """Rows that could not be read and were left out on request.

    Attributes:
        rows: How many.
        first: What was wrong with the first three, a line each.
    """

    rows: int = 0
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Documents or instruction records; exactly one of the two is not empty.

    Attributes:
        name: The file's path as given, or the name of a built-in text.
        split: Part of the text: ``all``, ``train``, ``validation``, ``test`` or ``held-out``.
        documents: Texts, none of them blank.
        records: Instructions with their answers.
        skipped: Rows of the source that were left out because they could not be read.
    """

    name: str
    split: str
    documents: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    skipped: Skipped = Skipped()

    def __post_init__(self) -> None:
        assert bool(self.documents) != bool(self.records), "a corpus holds documents or records"

    def __len__(self) -> int:
        return len(self.documents) or len(self.records)

    @property
    def n_bytes(self) -> int:
        """Number of bytes of all texts in UTF-8; a record counts with all of its texts."""
        fields = (part for record in self.records for part in record.texts)
        return sum(len(text.encode()) for text in (*self.documents, *fields))


def read_corpus(path: Path | str | None, split: Split, *, skip_bad: bool = False) -> Corpus:
    """Reads texts or records from a file or a data set, or the built-in text.

    Args:
        path: A ``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a folder that ``datasets`` saved, or
            ``hf:NAME[:CONFIG][#SPLIT]``; None for the built-in text.
        split: Which split of the built-in text. A file is always read from its first to its last row.
        skip_bad: Leave out rows that cannot be read and count them, instead of refusing the file.

    Returns:
        At least one document or record.

    Raises:
        DataError: The source is missing, a folder of another kind, empty, binary or malformed, or its suffix is not known.
    """
    if path is None:
        return Corpus(BUILT_IN, split, documents=tuple(document.text for document in seedling_corpus.documents(split)))
    if is_dataset(path):
        return corpus_of(str(path), dataset_rows(path), skip_bad=skip_bad)
    path = Path(path)
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        if not (documents := _documents(text)):
            raise DataError(f"'{path}' is empty or blank; give a file with at least one document")
        return Corpus(str(path), "all", documents=documents)
    table = path.suffix.lower() in TABLES
    return corpus_of(str(path), table_rows(path, text) if table else object_rows(path, text), skip_bad=skip_bad)


def corpus_of(name: str, rows: Iterable[tuple[str, Any]], *, skip_bad: bool = False) -> Corpus:
    """Returns the corpus of rows that are already objects.

    Args:
        name: Name of the source, for messages.
        rows: Each with its place for messages; the value is an object in one of the known forms, or the error that reading it gave.
        skip_bad: Leave out rows that cannot be read and count them.

    Raises:
        DataError: A row cannot be read and ``skip_bad`` is off, texts and records are mixed, or nothing is left.
    """
    documents: list[str] = []
    records: list[Record] = []
    first: dict[str, str] = {}
    bad: list[str] = []
    count = 0
    for place, value in rows:
        try:
            entry = entry_of(f"'{name}', {place}", _readable(value))
        except DataError as error:
            if not skip_bad:
                raise
            count += 1
            bad = [*bad, str(error)][:3]
            continue
        match entry:
            case Record():
                first.setdefault("record", place)
                records.append(entry)
            case str():
                first.setdefault("text", place)
                documents += [entry] if entry.strip() else []
        if len(first) == 2:
            raise DataError(
                f"'{name}' mixes kinds: {first['text']} is a text, {first['record']} is an instruction; split it into two files"
            )
    if not documents and not records:
        reason = f"has no row that can be read ({count} skipped, the first: {bad[0]})" if bad else "is empty or blank"
        raise DataError(f"'{name}' {reason}; give a file with at least one document")
    return Corpus(name, "all", tuple(documents), tuple(records), Skipped(count, tuple(bad)))


def read_text(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Returns a file's text without byte-order mark and with Unix line ends.

    Raises:
        DataError: The file is missing, a folder or binary, or has another suffix.
    """
    known = ", ".join(suffixes)
    try:
        path_of(path, "file")
        if path.is_dir():
            raise DataError(f"'{path}' is a folder; give one file ({known})")
        if not path.exists():
            raise DataError(f"'{path}' does not exist; give the path of a file ({known})")
        if path.suffix.lower() not in suffixes:
            suffix = f"the suffix '{path.suffix}'" if path.suffix else "no suffix"
            raise DataError(f"'{path}' has {suffix}; known: {known}: rename or convert it")
        check_ordinary(path, DataError)
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}; check its permissions") from None
    if b"\0" in data:
        raise DataError(f"'{path}' is binary (a NUL byte at offset {data.index(0)}); give plain text in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is binary or not UTF-8 (at byte {error.start}); give plain text in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(text: str) -> tuple[str, ...]:
    """Splits a text at its separators; a text without separators is one document, unchanged."""
    if SEPARATOR not in text:
        return (text,) if text.strip() else ()
    return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())


def read_objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the values of a JSON or JSON Lines file, each with its place for messages.

    Raises:
        DataError: A line is not valid JSON.
    """
    return _or_raise(object_rows(path, text))


def _or_raise(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        yield place, _readable(row)


def _readable(row: Any) -> Any:
    """Returns a row, or raises the error that stands in its place because it could not be read."""
    if isinstance(row, DataError):
        raise row
    return row


def object_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the values of a JSON or JSON Lines file, each with its place for messages; a line that cannot be read yields its error."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parsed(path, line, number)
        return
    if not text.strip():
        return
    value = _readable(_parsed(path, text, 1))
    match value:
        case list():
            yield from ((f"record {number}", entry) for number, entry in enumerate(value, 1))
        case _:
            yield "record 1", value


def read_table(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a table by the names on its first line, each with its place for messages.

    Raises:
        DataError: A line has more or fewer fields than the first.
    """
    return list(_or_raise(table_rows(path, text)))


def table_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a table, each with its place for messages; a line with more or fewer fields than the first yields its error.

    Fields are separated by tabs if the suffix is ``.tsv`` or the first line has a tab, else by commas.

    Raises:
        DataError: The text is no table, from some line on.
    """
    first = text.partition("\n")[0]
    tabs = path.suffix.lower() == ".tsv" or "\t" in first
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    names = reader.fieldnames or []
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                count = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())
                yield place, DataError(f"'{path}', {place} has {count} columns, the first line {len(names)}; repair that line")
            else:
                yield place, row
    except csv.Error as error:
        raise DataError(f"'{path}' is no table at line {reader.line_num}: {error}; repair that line") from None


def _parsed(path: Path, text: str, first_line: int) -> Any:
    """Returns the value of a JSON text, or the error that reading it gave."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        lines = error.msg == "Extra data" and path.suffix.lower() == ".json"
        remedy = "if it is JSON Lines, rename it to .jsonl" if lines else "repair that line"
        return DataError(f"'{path}' is not valid JSON at line {line}, column {error.colno}: {error.msg}; {remedy}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        return DataError(f"'{path}' cannot be read as JSON from line {first_line}: {error}; repair that value")


def split_corpus(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Splits a corpus by document into a used and a held-out part, the same way for the same seed.

    Documents are drawn at random until they hold ``share`` of the characters. If the documents are too few or too unequal for that, the
    end of the longest document is held out instead, from the start of a line. Records are split by count.

    Args:
        corpus: The corpus to split.
        share: Share to hold out, between 0 and 1.
        seed: Seed of the draw.

    Returns:
        The used part and the held-out part; neither is empty.

    Raises:
        InputError: The share is not between 0 and 1.
        DataError: The corpus is too small to split.
    """
    if not 0.0 < share < 1.0:
        raise InputError(f"the held-out share is {share}; it must lie between 0 and 1, such as 0.05")
    count = len(corpus)
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if corpus.records:
        if count < 2:
            raise DataError(f"'{corpus.name}' has one record; holding out a share of it takes at least 2")
        held = set(order[: min(count - 1, max(1, round(share * count)))])
    else:
        held = _drawn([len(document) for document in corpus.documents], order, share)
    if not held:
        return _tail_held_out(corpus, share)
    halves = [[index for index in range(count) if (index in held) == chosen] for chosen in (False, True)]
    rest, out = (
        replace(
            corpus,
            split=split,
            documents=tuple(corpus.documents[index] for index in half) if corpus.documents else (),
            records=tuple(corpus.records[index] for index in half) if corpus.records else (),
        )
        for split, half in zip(("train", "held-out"), halves, strict=True)
    )
    return rest, out


def _drawn(sizes: list[int], order: list[int], share: float) -> set[int]:
    """Draws documents with about ``share`` of the characters; none if they would hold less than half of that."""
    wanted = share * sum(sizes)
    held: set[int] = set()
    total = 0
    for index in order:
        if total + sizes[index] <= 1.25 * wanted and len(held) < len(sizes) - 1:
            held.add(index)
            total += sizes[index]
        if total >= wanted:
            break
    return held if total >= wanted / 2 else set()


def _tail_held_out(corpus: Corpus, share: float) -> tuple[Corpus, Corpus]:
    """Holds out the end of the longest document."""
    sizes = [len(document) for document in corpus.documents]
    longest = sizes.index(max(sizes))
    text = corpus.documents[longest]
    end = len(text.rstrip())
    cut = max(1, end - max(1, round(share * sum(sizes))))
    for boundary in ("\n", " "):
        found = text.rfind(boundary, 0, cut) + 1
        if found > end // 2:
            cut = found
            break
    head, tail = text[:cut], text[cut:]
    if not head.strip() or not tail.strip():
        raise DataError(f"'{corpus.name}' has {sum(sizes)} characters: too short to hold out {share:.0%} of it; give more text")
    rest = (*corpus.documents[:longest], head, *corpus.documents[longest + 1 :])
    return replace(corpus, split="train", documents=rest), replace(corpus, split="held-out", documents=(tail,))
