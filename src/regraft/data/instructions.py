"""Instruction records as text and as tokens, in the Alpaca prompt format.

The prompt is the one that models tuned on Alpaca data were trained with (Stanford Alpaca, 2023): a model recovered here answers
the same prompt as they do, and the other way round. Only the response carries loss, as in LLM-Pruner's recovery (arXiv
2305.11627).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from regraft.data.encoding import Bos, bos_id, plain_ids
from regraft.data.text import Corpus, Record
from regraft.errors import DataError, InputError

IGNORED = -100
"""Label of a token that carries no loss, as in PyTorch's cross-entropy and in transformers."""

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class EncodedRecord:
    """A record as token ids.

    Attributes:
        input_ids: BOS where the tokenizer writes one, the prompt, the response, and EOS where the tokenizer has one.
        prompt_tokens: How many of them are not the response.
    """

    input_ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def labels(self) -> list[int]:
        """The ids to predict, of the same length: ``-100`` on the prompt."""
        return [IGNORED] * self.prompt_tokens + list(self.input_ids[self.prompt_tokens :])


def prompt_of(record: Record) -> str:
    """Returns the prompt that asks a record's instruction.

    >>> prompt_of(Record("Add.", "1 and 2", "3")).splitlines()[2:]
    ['### Instruction:', 'Add.', '', '### Input:', '1 and 2', '', '### Response:']
    >>> "Input" in prompt_of(Record("Add 1 and 2.", "", "3"))
    False
    """
    template = _WITH_INPUT if record.input.strip() else _WITHOUT_INPUT
    return template.format(instruction=record.instruction, input=record.input)


def render(record: Record) -> str:
    """Returns a record as one text: the prompt and the answer."""
    return prompt_of(record) + record.output


def encode_whole(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> list[EncodedRecord]:
    """Encodes the records of a corpus, however long.

    The response begins where the tokens of the whole text first differ from those of the prompt alone, so that a token that joins
    the two counts as response and the prompt is what a user's prompt will be.

    Args:
        corpus: Records.
        tokenizer: Of the model.
        bos: Whether each record starts with BOS; ``"auto"``: as the tokenizer does.
    """
    prompts = plain_ids([prompt_of(record) for record in corpus.records], tokenizer)
    wholes = plain_ids([render(record) for record in corpus.records], tokenizer)
    first = bos_id(tokenizer, bos)
    eos: Any = tokenizer.eos_token_id
    start = () if first is None else (first,)
    end = () if eos is None else (eos,)
    return [
        EncodedRecord((*start, *whole, *end), len(start) + _common_prefix(prompt, whole))
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]


def encode_record(record: Record, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[list[int], list[int]]:
    """Encodes one record for training, cut on the right where it is longer than ``max_tokens``.

    Returns:
        Token ids and labels of the same length; the labels are -100 on the prompt. A prompt of ``max_tokens`` or more leaves no
        label at all: :func:`encode_records` drops such records.
    """
    (encoded,) = encode_whole(Corpus("one record", "all", records=(record,)), tokenizer)
    return list(encoded.input_ids[:max_tokens]), encoded.labels[:max_tokens]


def encode_records(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Encodes every record of a corpus as :func:`encode_record` does, in order, without those that leave no room for a response.

    Raises:
        InputError: ``max_tokens`` is below 2.
        DataError: No record fits.
    """
    if max_tokens < 2:
        raise InputError(f"a record of {max_tokens} tokens holds no response; use a --seq-len of at least 2")
    encoded = encode_whole(corpus, tokenizer)
    fitting = [one for one in encoded if one.prompt_tokens < max_tokens]
    if not fitting:
        shortest = min(one.prompt_tokens for one in encoded)
        raise DataError(
            f"no record of '{corpus.name}' leaves room for a response in {max_tokens} tokens: "
            f"the shortest prompt takes {shortest}; use a longer --seq-len"
        )
    return [(list(one.input_ids[:max_tokens]), one.labels[:max_tokens]) for one in fitting]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many leading items two sequences share."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
