"""Texts and instruction records: read from a file or built in, checked, and divided into what is used and what is held out.

A file is ``.txt`` (documents separated by ``<|endoftext|>``, otherwise one document), ``.jsonl`` (an object on each line), ``.json`` (an
array of objects, or one object), ``.csv`` or ``.tsv`` (an object on each line, its keys on the first). An object is ``{"text": …}``,
``{"instruction": …, "input": …, "output": …}`` under these or other usual names, or ``{"messages": [...]}`` with one question and its
answer; other keys are allowed and not read. All text is UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from regraft.errors import DataError, InputError
from regraft.seedling import corpus as seedling_corpus

Split = Literal["train", "validation", "test"]

SEPARATOR = "<|endoftext|>"
TABLES = (".csv", ".tsv")
SUFFIXES = (".txt", ".jsonl", ".json", *TABLES)
# What data sets call the parts of a record; the first that is there counts.
PARTS = {
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
}
BUILT_IN = "seedling's built-in text"


@dataclass(frozen=True)
class Record:
    """One instruction and its answer.

    Attributes:
        instruction: What is asked.
        input: What it is asked about; may be empty.
        output: The answer, never blank.
    """

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Corpus:
    """Documents or instruction records: exactly one of the two is filled.

    Attributes:
        name: The file as it was named, or the name of a built-in text.
        split: Which part of it: ``all``, ``train``, ``validation``, ``test`` or ``held-out``.
        documents: Texts, none of them blank.
        records: Instructions with their answers.
    """

    name: str
    split: str
    documents: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        assert bool(self.documents) != bool(self.records), "a corpus holds documents or records"

    def __len__(self) -> int:
        return len(self.documents) or len(self.records)

    @property
    def n_bytes(self) -> int:
        """How many bytes of UTF-8 its texts are; of a record, all three fields."""
        fields = (part for record in self.records for part in (record.instruction, record.input, record.output))
        return sum(len(text.encode()) for text in (*self.documents, *fields))


def read_corpus(path: Path | str | None, split: Split) -> Corpus:
    """Reads a text or record file, or the built-in text.

    Args:
        path: A ``.txt``, ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` file; None for the built-in text.
        split: Which split of the built-in text. A file is always read whole.

    Returns:
        At least one document or record.

    Raises:
        DataError: The file is missing, a folder, empty, binary, malformed, or its suffix is not known.
    """
    if path is None:
        return Corpus(BUILT_IN, split, documents=tuple(document.text for document in seedling_corpus.documents(split)))
    path = Path(path)
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        documents, records = _documents(text), ()
    else:
        table = path.suffix.lower() in TABLES
        documents, records = _sorted_out(path, iter(read_table(path, text)) if table else read_objects(path, text))
    if not documents and not records:
        raise DataError(f"'{path}' is empty or blank; give a file with at least one document")
    return Corpus(str(path), "all", documents=documents, records=records)


def read_text(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Returns a file's text without byte-order mark and with plain line ends.

    Raises:
        DataError: It is missing, a folder or binary, or has another suffix.
    """
    known = ", ".join(suffixes)
    try:
        if path.is_dir():
            raise DataError(f"'{path}' is a folder; give one file ({known})")
        if not path.exists():
            raise DataError(f"'{path}' does not exist; give the path of a file ({known})")
        if path.suffix.lower() not in suffixes:
            suffix = f"the suffix '{path.suffix}'" if path.suffix else "no suffix"
            raise DataError(f"'{path}' has {suffix}; known: {known}: rename or convert it")
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
    """Divides a text at its separators; a text without any is one document, as it stands."""
    if SEPARATOR not in text:
        return (text,) if text.strip() else ()
    return tuple(part.strip() for part in text.split(SEPARATOR) if part.strip())


def read_objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the values of a JSON or JSON Lines file, each with the place to name in a message."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parsed(path, line, number)
        return
    if not text.strip():
        return
    value = _parsed(path, text, 1)
    for number, entry in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"record {number}", entry


def read_table(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows of a table by the names on its first line, each with the place to name in a message.

    Fields are divided by tabs where the suffix or the first line says so, else by commas.

    Raises:
        DataError: A line has more or fewer fields than the first.
    """
    first = text.partition("\n")[0]
    tabs = path.suffix.lower() == ".tsv" or "\t" in first
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    names = reader.fieldnames or []
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                count = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())
                raise DataError(f"'{path}', line {reader.line_num} has {count} columns, the first line {len(names)}; repair that line")
            rows.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        raise DataError(f"'{path}' is no table at line {reader.line_num}: {error}; repair that line") from None
    return rows


def _parsed(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        lines = error.msg == "Extra data" and path.suffix.lower() == ".json"
        remedy = "if it is JSON Lines, rename it to .jsonl" if lines else "repair that line"
        raise DataError(f"'{path}' is not valid JSON at line {line}, column {error.colno}: {error.msg}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise DataError(f"'{path}' cannot be read as JSON from line {first_line}: {error}; repair that value") from None


def _sorted_out(path: Path, objects: Iterator[tuple[str, Any]]) -> tuple[tuple[str, ...], tuple[Record, ...]]:
    """Checks every object; returns the texts that are not blank, or the records."""
    documents: list[str] = []
    records: list[Record] = []
    first: dict[str, str] = {}
    for place, value in objects:
        entry = _entry(f"'{path}', {place}", value)
        first.setdefault("record" if isinstance(entry, Record) else "text", place)
        if len(first) == 2:
            raise DataError(
                f"'{path}' mixes kinds: {first['text']} is a text, {first['record']} is an instruction; split it into two files"
            )
        if isinstance(entry, Record):
            records.append(entry)
        elif entry.strip():
            documents.append(entry)
    return tuple(documents), tuple(records)


def _entry(where: str, value: Any) -> str | Record:
    """Returns one object's text or record."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, not an object with 'text' or with instruction, input and output")
    if "messages" in value and not {"text", *PARTS["output"]} & value.keys():
        value = _exchange(where, value["messages"])
    told = any(name in value for part in ("instruction", "output") for name in PARTS[part])
    if "instruction" in value or "output" in value or (told and "text" not in value):
        parts = {part: _string(where, value, part) for part in PARTS}
        if not parts["output"].strip():
            raise DataError(f"{where} has an empty 'output': there is nothing to learn or to measure; remove the record")
        if not parts["instruction"].strip() and not parts["input"].strip():
            raise DataError(f"{where} has an empty 'instruction'; remove the record or fill it in")
        return Record(**parts)
    if "text" not in value:
        found = ", ".join(map(repr, list(value)[:6])) or "none"
        raise DataError(f"{where} has neither 'text' nor instruction, input and output; its keys: {found}")
    return _string(where, value, "text")


def _exchange(where: str, messages: Any) -> dict[str, Any]:
    """Returns a question and its answer in the form of chats as an instruction and its output; a system's message comes before."""
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    roles = [turn.get("role") for turn in turns]
    said = [text for turn in turns if isinstance(text := turn.get("content"), str)]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]) or not len(said) == len(turns) == len(messages):
        raise DataError(f"{where} has 'messages' that are not one of a user and one of the assistant, in text; divide longer chats")
    return {"instruction": "\n\n".join(said[:-1]), "output": said[-1]}


def _string(where: str, value: dict[str, Any], part: str) -> str:
    """Returns a string field by the first of its names; ``input`` alone may be absent or null."""
    key = next((name for name in PARTS.get(part, ()) if name in value), part)
    found = value.get(key, "" if part == "input" else None)
    if part == "input" and found is None:
        found = ""
    if not isinstance(found, str):
        problem = f"has '{key}' of type {type(found).__name__}" if key in value else f"has no '{key}'"
        raise DataError(f"{where} {problem}; it must be a string")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half a surrogate pair in '{key}', which no text holds; repair the \\u escape") from None
    return found


def split_corpus(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Divides a corpus into what is used and what is held out, by document and the same way for the same seed.

    Documents are drawn at random until they hold ``share`` of the characters. Where no such draw exists, since the documents are
    too few or too unequal, the end of the longest document is held out instead, from a line start. Records are divided by count.

    Args:
        corpus: What to divide.
        share: How much is held out, between 0 and 1.
        seed: Of the draw.

    Returns:
        What is left, and what is held out; neither is empty.

    Raises:
        InputError: The share is not between 0 and 1.
        DataError: There is too little to divide.
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
    """Draws documents of about ``share`` of the characters; none where the draw would miss it by half."""
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
