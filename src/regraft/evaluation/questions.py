"""Tasks: questions with choices, and questions that are answered in words; from files, or made from any text.

A file of questions is ``.jsonl``, ``.json``, ``.csv`` or ``.tsv``, one item in a row: ``question``, ``choices`` (texts) and ``answer``
(the number of the right choice from 0, its letter, or its text). Without ``choices`` an item is answered in words, and ``answer`` is a text
or a list of texts of which each is right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.data.text import TABLES, Corpus, read_objects, read_text, table_rows
from regraft.errors import DataError, InputError, shown
from regraft.reading import list_in, text_in

QUESTION_SUFFIXES = (".jsonl", ".json", *TABLES)
FROM_TEXT = ("continuation", "repetition")
VERSION = "1"
DEFAULT_ITEMS = 200

CONTEXT_WORDS = 40
CONTINUATION_WORDS = 10
CHOICES = 4
_SEED = 20_26


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        prompt: What the model reads.
        choices: What may follow, each with the space before it; empty where the answer is in words.
        right: Number of the right choice.
        answers: Right answers in words; empty where there are choices, or where no answer is right or wrong.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    right: int = 0
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items of one kind.

    Attributes:
        name: Name of the task, or its file.
        items: At least one.
        shots: Number of solved examples in front of each prompt.
    """

    name: str
    items: tuple[Item, ...]
    shots: int = 0

    @property
    def has_choices(self) -> bool:
        """Whether the items have choices; either all have, or none."""
        return bool(self.items[0].choices)


def read_task(path: Path, shots: int = 0, limit: int | None = None) -> Task:
    """Reads the questions of a file. The first ``shots`` of them are shown, solved, before each of the others.

    Raises:
        DataError: The file cannot be read, an item lacks a part or has an answer that is none of its choices, some items have choices and
            others not, or nothing is left behind the examples.
    """
    text = read_text(path, QUESTION_SUFFIXES)
    rows = table_rows(path, text) if path.suffix.lower() in TABLES else read_objects(path, text)
    items: list[Item] = []
    for place, row in rows:
        if isinstance(row, DataError):
            raise row
        items.append(_item(f"'{shown(path)}', {place}", row))
        if bool(items[-1].choices) != bool(items[0].choices):
            raise DataError(f"'{shown(path)}', {place}: some questions have choices and others not; split the file into two")
        if limit is not None and len(items) == limit + shots:
            break
    if len(items) <= shots:
        raise DataError(
            f"'{shown(path)}' has {len(items)} questions, and `shots={shots}` of them are examples; give more, or fewer `shots`"
        )
    examples = "".join(f"{item.prompt}{_solution(item)}\n\n" for item in items[:shots])
    return Task(str(path), tuple(Item(examples + item.prompt, item.choices, item.right, item.answers) for item in items[shots:]), shots)


def _solution(item: Item) -> str:
    return item.choices[item.right] if item.choices else f" {item.answers[0]}"


def _item(where: str, row: Any) -> Item:
    """Returns the item of a row.

    Raises:
        DataError: A part is missing or of another kind.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is no object; write {{'question': ..., 'choices': [...], 'answer': ...}}")
    question, answer = text_in(row.get("question")), row.get("answer")
    if question is None or not question.strip():
        raise DataError(f"{where} has no 'question'; each item needs one, as text")
    if answer is None or answer == "" or answer == []:
        raise DataError(f"{where} has no 'answer'; give the number, the letter or the text of the right choice, or the answer in words")
    choices = _choices(where, row.get("choices"))
    if not choices:
        answers = list_in(answer) or [answer]
        if not all(isinstance(one, str | int | float) and str(one).strip() for one in answers):
            raise DataError(f"{where}: 'answer' is {shown(repr(answer), 60)}; give a text, or a list of texts of which each is right")
        return Item(question, answers=tuple(str(one) for one in answers))
    return Item(question, tuple(f" {choice}" for choice in choices), _right(where, answer, choices))


def _choices(where: str, value: Any) -> tuple[str, ...]:
    if text := (text_in(value) or "").strip():  # in a table: a JSON list
        try:
            value = json.loads(text)
        except ValueError:
            raise DataError(f'{where}: \'choices\' is no JSON list; write ["one", "two"]') from None
    if value is None or value == "":
        return ()
    if len(list_in(value)) < 2 or not all((text_in(one) or "").strip() for one in value):
        raise DataError(f"{where}: 'choices' is {shown(repr(value), 60)}; give at least two texts")
    if len(set(value)) < len(value):
        raise DataError(f"{where}: 'choices' has one text twice; each must differ from the others")
    return tuple(value)


def _right(where: str, answer: Any, choices: Sequence[str]) -> int:
    """Returns the number of the right choice, which is given by its text, its number from 0, or its letter."""
    text = str(answer).strip()
    if answer in choices:
        return choices.index(answer)
    if text.isascii() and text.isdigit() and int(text[:9]) < len(choices):
        return int(text)
    if len(text) == 1 and "A" <= text.upper() <= "Z" and ord(text.upper()) - ord("A") < len(choices):
        return ord(text.upper()) - ord("A")
    known = f"0 to {len(choices) - 1}, A to {chr(ord('A') + len(choices) - 1)}, or the text of a choice"
    raise DataError(f"{where}: the answer {shown(repr(answer), 60)} is none of the {len(choices)} choices; give {known}")


def task_from_text(name: str, corpus: Corpus, items: int | None = None) -> Task:
    """Returns ``continuation`` or ``repetition``, made from a text. The same text gives the same items, for every tokenizer.

    ``continuation``: after 40 words of the text, which 10 words follow? The three wrong choices are what follows at other places of it,
    drawn by a generator of fixed seed. ``repetition``: the model continues 40 words, and the share of repeated 4-grams is counted.

    Raises:
        DataError: The text is too short for it.
        InputError: There is no such task.
    """
    if name not in FROM_TEXT:
        raise InputError(f"task '{shown(name)}' is not made from text; known: {', '.join(FROM_TEXT)}")
    pieces = list(_pieces(corpus))
    if len(pieces) < CHOICES:
        raise DataError(
            f"'{shown(corpus.name)}' has {len(pieces)} pieces of {CONTEXT_WORDS + CONTINUATION_WORDS} words, and the task {name} needs "
            f"{CHOICES} that differ; give more text"
        )
    wanted = min(items or DEFAULT_ITEMS, len(pieces))
    chosen = [round(index * (len(pieces) - 1) / max(1, wanted - 1)) for index in range(wanted)]  # spread evenly over the text
    if name == "repetition":
        return Task(name, tuple(Item(pieces[index][0]) for index in chosen))
    draw = torch.Generator().manual_seed(_SEED)
    return Task(name, tuple(_continuation(pieces, index, draw) for index in chosen))


def _continuation(pieces: Sequence[tuple[str, str]], index: int, draw: torch.Generator) -> Item:
    context, truth = pieces[index]
    wrong: list[str] = []
    for other in torch.randperm(len(pieces), generator=draw).tolist():
        if pieces[other][1] not in (truth, *wrong):
            wrong.append(pieces[other][1])
        if len(wrong) == CHOICES - 1:
            break
    right = int(torch.randint(len(wrong) + 1, (1,), generator=draw))
    choices = [*wrong[:right], truth, *wrong[right:]]
    return Item(context, tuple(f" {choice}" for choice in choices), right)


def _pieces(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Yields contexts and what follows them, in words, one after the other without overlap; a continuation that came before is left out."""
    seen: set[str] = set()
    texts = corpus.documents or tuple("\n".join(record.texts) for record in corpus.records)
    for text in texts:
        words = text.split()
        for start in range(0, len(words) - CONTEXT_WORDS - CONTINUATION_WORDS + 1, CONTEXT_WORDS + CONTINUATION_WORDS):
            middle = start + CONTEXT_WORDS
            follows = " ".join(words[middle : middle + CONTINUATION_WORDS])
            if follows not in seen:
                seen.add(follows)
                yield " ".join(words[start:middle]), follows
