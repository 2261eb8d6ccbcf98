"""Token ids of a corpus: by document, packed into blocks, and as calibration windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from regraft.data.encoding import Bos, bos_id, plain_ids
from regraft.data.instructions import PromptFormat, texts_of
from regraft.data.text import Corpus
from regraft.errors import DataError, InputError

# Calibration reads at least this many characters before it draws windows, so that a few long documents do not fill all of them.
_DRAWN_FROM_CHARS = 1 << 19
_PIECE_CHARS = 1 << 16
_BATCH_CHARS = 1 << 17


def context_limit(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence that a model takes, in tokens, or None for a model without a limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_context(tokens: int, config: PretrainedConfig, setting: str, most: int | None = None) -> None:
    """Refuses a length beyond a model's context.

    Args:
        tokens: The requested length.
        config: Config of the model.
        setting: Name of the setting that gives the length, such as ``seq_len``.
        most: The model's context, if it is shorter than its config states.

    Raises:
        InputError: The length exceeds the context.
    """
    limit = most or context_limit(config)
    if limit is not None and tokens > limit:
        raise InputError(f"`{setting}={tokens}` exceeds the model's context of {limit} tokens; use at most {limit}")


def window_tokens(asked: int | None, usual: int, config: PretrainedConfig, setting: str, most: int | None = None) -> int:
    """Returns the length of a window: the requested one, or else the usual length, at most the model's context.

    Args:
        asked: The requested length in tokens; None for the usual one.
        usual: The usual length in tokens.
        config: Config of the model.
        setting: Name of the setting that gives the length, such as ``seq_len``.
        most: The model's context, if it is shorter than its config states.

    Raises:
        InputError: The requested length exceeds the model's context.
    """
    if asked is not None:
        check_context(asked, config, setting, most)
        return asked
    return min(usual, most or context_limit(config) or usual)


def encode_documents(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> list[list[int]]:
    """Encodes every document of a corpus by itself; records become one text each in the model's prompt format.

    Args:
        corpus: Documents or records.
        tokenizer: Tokenizer of the model.
        bos: Whether each document starts with BOS; ``"auto"`` follows the tokenizer.

    Returns:
        One list of ids for each document, in order.
    """
    start = _start(tokenizer, bos)
    return [start + ids for batch in _batches(texts_of(corpus, tokenizer)) for ids in plain_ids(batch, tokenizer)]


def pack(documents: Sequence[Sequence[int]], block: int, separator: int | None = None) -> Tensor:
    """Concatenates documents and cuts them into blocks. An incomplete last block is dropped; nothing is padded.

    Args:
        documents: Token ids of each document, with BOS if the model needs it.
        block: Number of tokens in a block.
        separator: An id between two documents, such as EOS; None for nothing.

    Returns:
        Shape ``(n, block)``, int64, ``n >= 1``.

    Raises:
        InputError: ``block`` is below 1.
        DataError: All documents together are shorter than one block.
    """
    if block < 1:
        raise InputError(f"a block of {block} tokens holds nothing; use at least 1")
    stream = list(_joined(documents, separator))
    count = len(stream) // block
    if count == 0:
        raise DataError(f"the text has {len(stream)} tokens, fewer than one window of {block}; give more text or a shorter `seq_len`")
    return torch.tensor(stream[: count * block], dtype=torch.int64).reshape(count, block)


def calibration_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int, prompt: PromptFormat = "auto"
) -> Tensor:
    """Draws windows of text for calibration: no padding, no window twice, the same for the same seed.

    Documents are shuffled and concatenated, each with its BOS (if the tokenizer writes one). The stream is cut into windows, and some of
    the windows are drawn. Only as much text as needed is encoded: a very long document counts as several of 65,536 characters.

    Args:
        corpus: Documents or records.
        tokenizer: The model's tokenizer.
        samples: How many windows.
        seq_len: Tokens of a window.
        seed: Seed for drawing windows.
        prompt: The format in which records become texts.

    Returns:
        Shape ``(windows, seq_len)``, int64: ``samples`` windows, or as many as the text has; at least one.

    Raises:
        InputError: ``samples`` or ``seq_len`` is below 1.
        DataError: The text is shorter than one window.
    """
    if samples < 1 or seq_len < 1:
        raise InputError(f"{samples} windows of {seq_len} tokens are nothing to calibrate on; use at least 1 of each")
    generator = torch.Generator().manual_seed(seed)
    pieces = [piece for text in texts_of(corpus, tokenizer, prompt) for piece in _pieces(text)]
    order: list[int] = torch.randperm(len(pieces), generator=generator).tolist()
    start = _start(tokenizer, "auto")
    stream: list[int] = []
    chars = 0
    for batch in _batches([pieces[index] for index in order]):
        stream += chain.from_iterable(start + ids for ids in plain_ids(batch, tokenizer))
        chars += sum(map(len, batch))
        if len(stream) >= samples * seq_len and chars >= _DRAWN_FROM_CHARS:
            break
    if len(stream) < seq_len:
        raise DataError(
            f"'{corpus.name}' has {len(stream)} tokens, fewer than one calibration window of {seq_len}; "
            "give a longer `calibration` text or a shorter `seq_len`"
        )
    windows = pack([stream], seq_len)
    return windows[torch.randperm(len(windows), generator=generator)[:samples]]


def _start(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    token = bos_id(tokenizer, bos)
    return [] if token is None else [token]


def _joined(documents: Sequence[Sequence[int]], separator: int | None) -> Iterator[int]:
    for index, document in enumerate(documents):
        if index and separator is not None:
            yield separator
        yield from document


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text at line ends, or else at spaces, into pieces of at most ``_PIECE_CHARS`` characters."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        boundary = text.rfind("\n", start, end)
        if boundary <= start:
            boundary = text.rfind(" ", start, end)
        end = boundary + 1 if boundary > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yields batches of texts, large enough for the tokenizer to use every core and small enough for little memory."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
