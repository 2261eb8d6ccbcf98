"""Instruction records and chats as text and as tokens: by the model's own chat template, or in the Alpaca prompt format.

The chat template is the one in the tokenizer, so that a model recovered here answers the prompts that its users send. Models without a
template get the Alpaca prompt (Stanford Alpaca, 2023). Only the assistant's tokens carry loss, as in LLM-Pruner's recovery (arXiv
2305.11627).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from regraft.data.encoding import Bos, bos_id, plain_ids
from regraft.data.records import Record
from regraft.data.text import Corpus
from regraft.errors import DataError, InputError

PromptFormat = Literal["auto", "chat", "alpaca"]
Truncation = Literal["right", "left", "drop"]

IGNORED = -100
"""Label of a token without loss, as in PyTorch's cross-entropy and in transformers."""

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


# A record is cut before it is encoded where its end cannot be among the tokens that are kept: no token of a known vocabulary has so many
# characters. So a row of megabytes takes no longer than one of the window's length.
_MOST_TOKEN_CHARS = 256
_LEAST_CHARS = 1 << 16

# Templates may mark the assistant's tokens themselves; transformers reads this mark.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids.

    Attributes:
        input_ids: BOS where the format writes one, the prompt, the response, and EOS or the template's end of a turn.
        answers: Spans ``(start, end)`` of the assistant's tokens, in order; the last one is the answer.
    """

    input_ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens before the last answer."""
        return self.answers[-1][0]

    @property
    def labels(self) -> list[int]:
        """The ids to predict, of the same length: ``-100`` on every token that is not the assistant's."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.answers:
            labels[start:end] = self.input_ids[start:end]
        return labels


@dataclass(frozen=True)
class RecordCounts:
    """Counts of the records of a corpus when they were encoded for training.

    Attributes:
        records: Number of records that were encoded.
        dropped: Number of records that were left out, since no token of an answer fits.
        cut: Shortened to the window: with truncation "right" their end is missing, EOS included.
        prompt: The format, ``chat`` or ``alpaca``.
        max_tokens: The window.
    """

    records: int
    dropped: int
    cut: int
    prompt: str
    max_tokens: int

    @property
    def share_lost(self) -> float:
        """Share of the records that were dropped or cut."""
        return (self.dropped + self.cut) / self.records

    def __str__(self) -> str:
        by = "chat template" if self.prompt == "chat" else "Alpaca prompt"
        return f"{self.records:,} records by the {by}: {self.dropped:,} dropped and {self.cut:,} cut at {self.max_tokens} tokens"


def format_of(tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat) -> Literal["chat", "alpaca"]:
    """Returns the prompt format: ``auto`` is the chat template where the tokenizer has one, else Alpaca's.

    Raises:
        InputError: ``chat`` is asked for and the tokenizer has no chat template.
    """
    if prompt == "alpaca":
        return "alpaca"
    if tokenizer.chat_template:
        return "chat"
    if prompt == "chat":
        raise InputError(
            "prompt is 'chat', and this tokenizer has no chat template; use prompt 'alpaca', or give the folder its chat_template.jinja"
        )
    return "alpaca"


def prompt_of(record: Record) -> str:
    """Returns the Alpaca prompt that asks a record's instruction; earlier exchanges of a chat come before it.

    >>> prompt_of(Record("Add.", "1 and 2", "3")).splitlines()[2:]
    ['### Instruction:', 'Add.', '', '### Input:', '1 and 2', '', '### Response:']
    >>> "Input" in prompt_of(Record("Add 1 and 2.", "", "3"))
    False
    """
    return _alpaca_parts(record)[-1][0]


def _alpaca_parts(record: Record) -> list[tuple[str, str]]:
    """Returns for each answer of a record (all text before it, all text up to its end)."""
    parts: list[tuple[str, str]] = []
    text = ""
    exchanges = [*((user, "", answer) for user, answer in record.history), (record.instruction, record.input, record.output)]
    for index, (instruction, context, answer) in enumerate(exchanges):
        asked = "\n\n".join((record.system, instruction)) if index == 0 and record.system.strip() else instruction
        template = _WITH_INPUT if context.strip() else _WITHOUT_INPUT
        before = text + ("\n\n" if text else "") + template.format(instruction=asked, input=context)
        text = before + answer
        parts.append((before, text))
    return parts


def render(record: Record) -> str:
    """Returns a record as one text in the Alpaca format: the prompt and the answer."""
    return prompt_of(record) + record.output


def texts_of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat = "auto") -> tuple[str, ...]:
    """Returns the documents of a corpus, or its records as texts in the prompt format of a model.

    Raises:
        DataError: The chat template refuses a record.
        InputError: There is no such format.
    """
    if corpus.documents:
        return corpus.documents
    if format_of(tokenizer, prompt) == "alpaca":
        return tuple(render(record) for record in corpus.records)
    return tuple(_templated(corpus.name, number, record, tokenizer)[-1][1] for number, record in enumerate(corpus.records, 1))


def encode_whole(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto", prompt: PromptFormat = "auto", most_chars: int | None = None
) -> list[EncodedRecord]:
    """Encodes the records of a corpus, however long, unless there is a limit.

    An answer begins where the tokens of the whole text first differ from those of the prompt alone, so that a token that joins
    the two counts as answer and the prompt is what a user's prompt will be.

    Args:
        corpus: Records.
        tokenizer: The model's tokenizer.
        bos: Whether each record starts with BOS; ``"auto"``: as the tokenizer, or its chat template, does.
        prompt: The format of the prompt.
        most_chars: Number of characters of each record that are encoded; None for all. Templates that mark tokens themselves encode all.

    Raises:
        DataError: The chat template refuses a record.
        InputError: There is no such format, or no BOS token.
    """
    if format_of(tokenizer, prompt) == "chat":
        return _encode_chats(corpus, tokenizer, bos, most_chars)
    parts = [_alpaca_parts(record) for record in corpus.records]
    first = bos_id(tokenizer, bos)
    eos: Any = tokenizer.eos_token_id
    return _encode_parts(parts, tokenizer, () if first is None else (first,), () if eos is None else (eos,), most_chars)


def _encode_parts(
    parts: Sequence[Sequence[tuple[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    start: tuple[int, ...],
    end: tuple[int, ...],
    most_chars: int | None = None,
) -> list[EncodedRecord]:
    """Encodes records that are given as the texts before and up to the end of each answer; the last text is the record."""
    texts = [text[:most_chars] for record in parts for pair in record for text in pair]
    ids = iter(plain_ids(texts, tokenizer))
    found: list[EncodedRecord] = []
    for record in parts:
        encoded = [(next(ids), next(ids)) for _ in record]
        whole = encoded[-1][1]
        spans = [(_common_prefix(before, whole), _common_prefix(until, whole)) for before, until in encoded]
        shift = len(start)
        answers = tuple((shift + first, shift + last) for first, last in spans[:-1] if first < last)
        last = (shift + spans[-1][0], shift + len(whole) + len(end))
        found.append(EncodedRecord((*start, *whole, *end), (*answers, last)))
    return found


def _encode_chats(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos, most_chars: int | None) -> list[EncodedRecord]:
    """Encodes records by the tokenizer's chat template, which writes BOS and the ends of turns itself."""
    if _GENERATION.search(str(tokenizer.chat_template)):
        encoded = [_marked(corpus.name, number, record, tokenizer) for number, record in enumerate(corpus.records, 1)]
    else:
        parts = [_templated(corpus.name, number, record, tokenizer) for number, record in enumerate(corpus.records, 1)]
        encoded = _encode_parts(parts, tokenizer, (), (), most_chars)
    return encoded if bos == "auto" else [_with_bos(record, tokenizer, bos) for record in encoded]


def _with_bos(record: EncodedRecord, tokenizer: PreTrainedTokenizerBase, bos: bool) -> EncodedRecord:
    """Adds BOS to a record or takes it away, whatever the template wrote."""
    token: Any = tokenizer.bos_token_id if not bos else bos_id(tokenizer, True)
    if token is None or (record.input_ids[:1] == (token,)) == bos:
        return record
    move = 1 if bos else -1
    ids = (token, *record.input_ids) if bos else record.input_ids[1:]
    return EncodedRecord(ids, tuple((max(0, start + move), end + move) for start, end in record.answers))


def _templated(name: str, number: int, record: Record, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Returns for each answer (the text before it, the text up to its end) as the chat template writes them."""
    messages = _accepted(name, number, record, tokenizer)
    parts: list[tuple[str, str]] = []
    for index, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            before = _apply(tokenizer, messages[: index - 1], add_generation_prompt=True)
            parts.append((before, _apply(tokenizer, messages[:index])))
    return parts


def _marked(name: str, number: int, record: Record, tokenizer: PreTrainedTokenizerBase) -> EncodedRecord:
    """Encodes a record by a template that marks the assistant's tokens."""
    messages = _accepted(name, number, record, tokenizer)
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = tuple(encoded["input_ids"]), [*encoded["assistant_masks"], 0]
    edges = [index for index, (one, other) in enumerate(zip([0, *mask], mask, strict=False)) if one != other]
    answers = tuple(zip(edges[::2], edges[1::2], strict=True))
    if not answers:
        raise DataError(
            f"'{name}', record {number}: the chat template marks no token of the assistant; use prompt 'alpaca' or remove the record"
        )
    return EncodedRecord(ids, answers)


def _accepted(name: str, number: int, record: Record, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Returns the messages of a record in a form that the chat template takes.

    Where the template knows no system message, the first question begins with it, as the makers of such models advise.
    """
    messages = record.messages()
    try:
        _apply(tokenizer, messages)
    except Exception as error:  # a template is a program of its own and raises what it likes
        if messages[0]["role"] == "system":
            merged = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]
            try:
                _apply(tokenizer, merged)
            except Exception:
                merged = []
            if merged:
                return merged
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"'{name}', record {number} is refused by the chat template ({reason}); use prompt 'alpaca' or remove the record"
        ) from None
    return messages


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt))


def encode_record(record: Record, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[list[int], list[int]]:
    """Encodes one record for training, cut on the right to ``max_tokens``.

    Returns:
        Token ids and labels of the same length; the labels are -100 on the prompt. With a prompt of ``max_tokens`` or more, all labels
        are -100; :func:`encode_records` drops such records.
    """
    (encoded,) = encode_whole(Corpus("one record", "all", records=(record,)), tokenizer)
    return list(encoded.input_ids[:max_tokens]), encoded.labels[:max_tokens]


def encode_records(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    prompt: PromptFormat = "auto",
    truncation: Truncation = "right",
) -> tuple[list[tuple[list[int], list[int]]], RecordCounts]:
    """Encodes every record of a corpus for training, in order, without those that leave no room for an answer.

    Args:
        corpus: Records.
        tokenizer: The model's tokenizer.
        max_tokens: The window.
        prompt: The format of the prompt.
        truncation: What becomes of a longer record: ``right`` cuts its end, ``left`` its beginning, ``drop`` leaves it out.

    Returns:
        Token ids and labels of each record, and what became of all records.

    Raises:
        InputError: ``max_tokens`` is below 2, or there is no such format.
        DataError: No record fits, or the chat template refuses one.
    """
    if max_tokens < 2:
        raise InputError(f"a record of {max_tokens} tokens holds no response; use a seq_len of at least 2")
    most_chars = None if truncation == "left" else max(_LEAST_CHARS, _MOST_TOKEN_CHARS * max_tokens)
    encoded = encode_whole(corpus, tokenizer, prompt=prompt, most_chars=most_chars)
    rows: list[tuple[list[int], list[int]]] = []
    cut = 0
    for one in encoded:
        ids, labels = list(one.input_ids), one.labels
        longer = len(ids) > max_tokens
        if longer:
            ids, labels = (ids[-max_tokens:], labels[-max_tokens:]) if truncation == "left" else (ids[:max_tokens], labels[:max_tokens])
        # The first token of a row is predicted by nothing, so its label teaches nothing.
        if (longer and truncation == "drop") or all(label == IGNORED for label in labels[1:]):
            continue
        cut += longer
        rows.append((ids, labels))
    counts = RecordCounts(len(encoded), len(encoded) - len(rows), cut, format_of(tokenizer, prompt), max_tokens)
    if not rows:
        shortest = min(one.answers[0][0] for one in encoded)
        raise DataError(
            f"no record of '{corpus.name}' leaves room for a response in {max_tokens} tokens: "
            f"the shortest prompt takes {shortest}; use a longer seq_len"
        )
    return rows, counts


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many leading items two sequences share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
