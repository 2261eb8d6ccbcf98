"""Token sequences to predict, and the windows through which a model reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from regraft.data.encoding import Bos, bos_id
from regraft.data.instructions import encode_whole
from regraft.data.text import Corpus


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of one document or record, and the index from which they are predicted.

    Attributes:
        ids: All tokens.
        first_target: Index of the first predicted token, at least 1; all later tokens are predicted too.
        n_bytes: Number of UTF-8 bytes of the predicted tokens; BOS and EOS have none.
    """

    ids: tuple[int, ...]
    first_target: int
    n_bytes: int

    @property
    def targets(self) -> int:
        """Number of predicted tokens."""
        return max(0, len(self.ids) - self.first_target)


@dataclass(frozen=True)
class Window:
    """One forward pass over part of a sequence: the model reads ``ids[start:end]`` and each token predicts the next.

    Attributes:
        ids: All tokens of the sequence.
        start: Index of the first token that is read.
        end: Index after the last token that is read; below ``len(ids)``.
        first_scored: Index of the first read token whose prediction is scored; earlier tokens are only context.
    """

    ids: tuple[int, ...]
    start: int
    end: int
    first_scored: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def scored(self) -> int:
        """Number of scored predictions."""
        return self.end - self.first_scored


def sequences_of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos, max_tokens: int | None) -> list[TokenSequence]:
    """Encodes a corpus for measuring: each document separately; of a record, only the response is predicted.

    Args:
        corpus: Documents or records.
        tokenizer: Tokenizer of the model.
        bos: Whether each sequence starts with BOS; ``"auto"`` follows the tokenizer. Without BOS the first token is not predicted.
        max_tokens: Largest number of predicted tokens, which may end inside a document; None for all.

    Returns:
        The sequences with at least one token to predict, in order; the list may be empty.
    """
    found: list[TokenSequence] = []
    left = max_tokens
    for sequence in _records(corpus, tokenizer, bos, left) if corpus.records else _documents(corpus, tokenizer, bos, left):
        if sequence.targets:
            found.append(sequence)
            left = None if left is None else left - sequence.targets
            if left == 0:
                break
    return found


def windows_of(sequence: TokenSequence, window: int, stride: int) -> Iterator[Window]:
    """Yields windows over a sequence so that each token is predicted exactly once, with the longest context that the stride allows.

    The first window scores all of its tokens. Each later window starts ``stride`` tokens further on and scores only the tokens beyond
    the previous window. Windows without a scored token, such as those over a record's prompt, are left out.

    Args:
        sequence: The sequence to predict.
        window: Number of tokens that the model reads at once.
        stride: Number of tokens between the starts of two windows, at most ``window``.
    """
    last = len(sequence.ids) - 1
    scored = 0
    for start in range(0, max(1, last), stride):
        end = min(start + window, last)
        first = max(scored, sequence.first_target - 1)
        if first < end:
            yield Window(sequence.ids, start, end, first)
        scored = end
        if end == last:
            return


def _documents(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos, left: int | None) -> Iterator[TokenSequence]:
    """Yields documents one by one, so that no more are encoded than are used."""
    first = bos_id(tokenizer, bos)
    start = () if first is None else (first,)
    fast = bool(tokenizer.is_fast)
    for text in corpus.documents:
        encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=fast, verbose=False)
        plain: list[int] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
        unseen = 0 if start else 1
        kept = len(plain) if left is None else min(len(plain), left + unseen)
        offsets = encoded["offset_mapping"] if fast else None
        n_bytes = _prefix_bytes(text, kept, plain, offsets, tokenizer) - _prefix_bytes(text, unseen, plain, offsets, tokenizer)
        sequence = TokenSequence((*start, *plain[:kept]), 1, n_bytes)
        left = None if left is None else left - sequence.targets
        yield sequence


def _prefix_bytes(text: str, count: int, ids: list[int], offsets: list[tuple[int, int]] | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of bytes of a text's first ``count`` tokens: the bytes before the next token begins."""
    if count == 0 or not ids:
        return 0
    if count >= len(ids):
        return len(text.encode())
    if offsets is not None:
        return len(text[: offsets[count][0]].encode())
    # Tokenizers written in Python give no offsets. The length of the decoded tokens is the best substitute.
    return len(_decoded(tokenizer, ids[:count]).encode())


def _records(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos, left: int | None) -> Iterator[TokenSequence]:
    for record, encoded in zip(corpus.records, encode_whole(corpus, tokenizer, bos), strict=True):
        first = max(1, encoded.prompt_tokens)
        ids = encoded.input_ids if left is None else encoded.input_ids[: first + left]
        whole = len(ids) == len(encoded.input_ids)
        output = record.output if whole else _decoded(tokenizer, list(ids[first:]))
        sequence = TokenSequence(ids, first, len(output.encode()))
        left = None if left is None else left - sequence.targets
        yield sequence


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
