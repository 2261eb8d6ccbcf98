"""The held-out loss of seedling beside what it has to beat, all on the very same text."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaForCausalLM

from regraft.seedling.corpus import Document
from seedling.ngram import KneserNey, unigram_nats

_BATCH_WINDOWS = 8


class Figure(TypedDict):
    """What one model or compressor needs for the held-out text; a compressor knows no tokens."""

    loss_nats_per_token: float | None
    bits_per_byte: float


def model_nats(
    model: LlamaForCausalLM, documents: Sequence[NDArray[np.uint16]], window_tokens: int, stride_tokens: int
) -> NDArray[np.float64]:
    """Returns -log p of every token but the first of each document, each scored once.

    A document begins at its first token (BOS). Its first window scores all that it holds; each later one begins
    ``stride_tokens`` further and scores only what no window scored before it, so that those tokens see at least
    ``window_tokens - stride_tokens`` tokens of context.

    Returns:
        (n_scored_tokens,) float64, nats, in the order of the documents.

    Raises:
        ValueError: The stride leaves no token of context.
    """
    if not 1 <= stride_tokens < window_tokens:
        raise ValueError(f"stride {stride_tokens} has to lie in 1..{window_tokens - 1} for windows of {window_tokens} tokens")
    jobs = [(number, start) for number, document in enumerate(documents) for start in _starts(len(document), window_tokens, stride_tokens)]
    nats = [np.empty(len(document) - 1) for document in documents]
    model.eval()
    for first in range(0, len(jobs), _BATCH_WINDOWS):
        batch = jobs[first : first + _BATCH_WINDOWS]
        pieces = [documents[number][start : start + window_tokens] for number, start in batch]
        ids_BT = torch.zeros(len(pieces), max(map(len, pieces)), dtype=torch.int64)
        for row, piece in enumerate(pieces):  # shorter ones are filled up on the right, which a causal model does not see
            ids_BT[row, : len(piece)] = torch.from_numpy(piece.astype(np.int64))
        losses_BT = _losses(model, ids_BT)
        for (number, start), piece, losses_T in zip(batch, pieces, losses_BT, strict=True):
            scored_from = 0 if start == 0 else window_tokens - stride_tokens - 1
            end = len(piece) - 1
            nats[number][start + scored_from : start + end] = losses_T[scored_from:end].numpy()
    return np.concatenate(nats)


def _starts(tokens: int, window_tokens: int, stride_tokens: int) -> range:
    """Returns where the windows of a document begin; the last one reaches its end."""
    beyond = max(0, tokens - window_tokens)
    return range(0, math.ceil(beyond / stride_tokens) * stride_tokens + 1, stride_tokens)


@torch.no_grad()
def _losses(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    """Returns -log p of each token but the first of each row: (B, T - 1) float64."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].double()
    picked_BT = logits_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return logits_BTV.logsumexp(-1) - picked_BT


def baselines(
    train: Sequence[NDArray[np.uint16]],
    test: Sequence[NDArray[np.uint16]],
    texts: Sequence[Document],
    vocabulary_tokens: int,
) -> dict[str, Figure]:
    """Returns the figures of unigram and 5-gram (on the tokens), gzip and xz (on the bytes of all texts in one stream)."""
    joined = "".join(document.text for document in texts).encode()
    five = KneserNey(train, 5, vocabulary_tokens)
    return {
        "unigram": figure(unigram_nats(train, test, vocabulary_tokens), len(joined)),
        "5-gram": figure(-np.log(five.probabilities(test)), len(joined)),
        "gzip -9": {"loss_nats_per_token": None, "bits_per_byte": 8 * len(gzip.compress(joined, 9, mtime=0)) / len(joined)},
        "xz -9e": {"loss_nats_per_token": None, "bits_per_byte": 8 * len(_xz(joined)) / len(joined)},
    }


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def figure(nats: NDArray[np.float64], text_bytes: int) -> Figure:
    """Returns the mean of the losses, and their sum in bits for each byte of the text."""
    return {
        "loss_nats_per_token": float(nats.mean()),
        "bits_per_byte": float(nats.sum() / math.log(2) / text_bytes),
    }
