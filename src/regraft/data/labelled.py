"""Labelled texts for classification and regression: each row has one text or a pair of texts, and a class or a number.

A file is ``.csv`` (commas, or tabs if its first line has tabs), ``.tsv``, ``.jsonl`` or ``.json``. Columns are found by name, in the first
line of a table or the keys of an object. The text is UTF-8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from regraft.data.records import Record
from regraft.data.text import TABLES, Skipped, read_objects, read_table, read_text
from regraft.errors import DataError, did_you_mean

LabelTask = Literal["classification", "regression"]

OBJECTS = (".jsonl", ".json")
# Usual names of text and label columns in benchmarks; the first match is used.
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
LABELS = ("label", "score", "labels")


@dataclass(frozen=True)
class Labelled:
    """Rows of text with their labels.

    Attributes:
        name: Path of the file.
        texts: One or two texts for each row.
        labels: One label for each row: the number of its class, or the value to predict.
        classes: Names of the classes, by number; empty for regression.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    classes: tuple[str, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """Instruction records: none."""
        return ()

    @property
    def skipped(self) -> Skipped:
        """Rows that were left out: none, since a row that cannot be read is refused."""
        return Skipped()

    @property
    def task(self) -> LabelTask:
        """The kind of task: classification or regression."""
        return "classification" if self.classes else "regression"

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Sequence[int]) -> Labelled:
        """Returns the rows at these indices."""
        return replace(self, texts=tuple(self.texts[i] for i in indices), labels=tuple(self.labels[i] for i in indices))


def read_labelled(
    path: Path | str,
    task: LabelTask,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    classes: Sequence[str] = (),
) -> Labelled:
    """Reads a file of labelled texts.

    Args:
        path: A ``.csv``, ``.tsv``, ``.jsonl`` or ``.json`` file.
        task: Kind of the labels: classes or numbers.
        text_columns: Names of one or two text columns; empty for the usual names of benchmarks.
        label_column: Name of the label column; None for ``label``, ``score`` or ``labels``.
        classes: Classes of an existing model, by number; empty to take the classes of the file.

    Raises:
        DataError: The file, a column or a label is missing or malformed; the file has a single class; or a class is not among ``classes``.
    """
    path = Path(path)
    rows = _rows(path)
    columns = list(rows[0][1])
    chosen = _text_columns(path, columns, text_columns)
    label = _label_column(path, columns, label_column)
    texts = tuple(tuple(_text(path, place, row, name) for name in chosen) for place, row in rows)
    raw = [(place, row.get(label)) for place, row in rows]
    if task == "regression":
        return Labelled(str(path), texts, tuple(_number(path, place, label, value) for place, value in raw), ())
    named = [_class(path, place, label, value) for place, value in raw]
    if classes:
        return Labelled(str(path), texts, _among(path, [place for place, _ in raw], named, classes), tuple(classes))
    classes = sorted(set(named), key=_in_order)
    if len(classes) < 2:
        raise DataError(f"'{path}' has the one class '{classes[0]}' in '{label}'; classification takes at least two")
    if len(classes) > max(2, len(named) // 2):
        raise DataError(f"'{path}' has {len(classes)} classes in {len(named)} rows of '{label}'; for numbers use `task=regression`")
    number = {name: float(index) for index, name in enumerate(classes)}
    return Labelled(str(path), texts, tuple(number[name] for name in named), tuple(classes))


def _in_order(name: str) -> tuple[bool, int, str]:
    """Returns the key by which names of classes are sorted: numbers by value before words, however many digits they have."""
    digits = name.lstrip("0") if name.isdecimal() else ""
    return not name.isdecimal(), len(digits), digits + name


def _among(path: Path, places: Sequence[str], named: Sequence[str], classes: Sequence[str]) -> tuple[float, ...]:
    """Returns the model's numbers of the labels, which are names of its classes or, if no label is a name, their numbers."""
    known = {name: float(index) for index, name in enumerate(classes)}
    if not known.keys() & set(named):
        known = {str(index): float(index) for index in range(len(classes))}
    for place, name in zip(places, named, strict=True):
        if name not in known:
            raise DataError(f"'{path}', {place}: {name[:40]!r} is none of the model's classes: {_listed(list(classes))}; mend the label")
    return tuple(known[name] for name in named)


def split_labelled(rows: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Splits rows at random, by the seed, into training rows and held-out rows; neither part is empty.

    Raises:
        DataError: There are fewer than two rows.
    """
    count = len(rows)
    if count < 2:
        raise DataError(f"'{rows.name}' has one row; holding out a share of it takes at least 2")
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(count - 1, max(1, round(share * count)))
    return rows.at(sorted(order[held:])), rows.at(sorted(order[:held]))


def _rows(path: Path) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """Returns every row as values by column, with its position in words for error messages."""
    text = read_text(path, (*TABLES, *OBJECTS))
    rows = read_table(path, text) if path.suffix.lower() in TABLES else _objects(path, text)
    if not rows:
        raise DataError(f"'{path}' holds no rows; give a file with at least two")
    return rows


def _objects(path: Path, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for place, value in read_objects(path, text):
        match value:
            case dict():
                rows.append((place, value))
            case _:
                raise DataError(f"'{path}', {place} is a {type(value).__name__}, not an object with texts and a label")
    return rows


def _text_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    if not wanted:
        for names in TEXTS:
            if all(name in columns for name in names):
                return names
        raise DataError(f"'{path}' has no column of a usual name for text; its columns: {_listed(columns)}: name them with `text_columns`")
    if len(wanted) > 2:
        raise DataError(f"`text_columns` names {len(wanted)} columns; give one, or two for pairs of texts")
    for name in wanted:
        _check_column(path, columns, name, "`text_columns`")
    return tuple(wanted)


def _label_column(path: Path, columns: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        _check_column(path, columns, wanted, "`label_column`")
        return wanted
    found = next((name for name in LABELS if name in columns), None)
    if found is None:
        raise DataError(f"'{path}' has no column 'label' or 'score'; its columns: {_listed(columns)}: name it with `label_column`")
    return found


def _check_column(path: Path, columns: Sequence[str], name: str, option: str) -> None:
    if name not in columns:
        raise DataError(f"'{path}' has no column '{name}' ({option}){did_you_mean(name, columns)}; its columns: {_listed(columns)}")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in columns[:8])


def _text(path: Path, place: str, row: Mapping[str, Any], name: str) -> str:
    match row.get(name):
        case str(text) if text.strip():
            return text
        case str():
            problem = "is empty"
        case value:
            problem = f"is of type {type(value).__name__}" if name in row else "is missing"
    raise DataError(f"'{path}', {place}: '{name}' {problem}; give text, or remove the row")


def _number(path: Path, place: str, name: str, value: Any) -> float:
    try:
        number = math.nan if value is True or value is False else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"'{path}', {place}: '{name}' is {str(value)[:40]!r}, not a number; mend it, or use `task=classification`")
    return number


def _class(path: Path, place: str, name: str, value: Any) -> str:
    match value:
        case str() | int() if str(value).strip():
            return str(value).strip()
        case _:
            raise DataError(f"'{path}', {place}: '{name}' is {str(value)[:40]!r}, not a class; give a name or a whole number")
