"""Baselines on tokens: a smoothed unigram, and an interpolated modified Kneser-Ney model of any order.

Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (Computer Speech & Language 13, 1999):
equation 24 for the recursion, 17 for the discounts. Departure: contexts never seen fall through to the next shorter one with
weight 1, and the recursion ends in the uniform distribution over the vocabulary, so that no token is impossible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]
_BITS_OF_A_TOKEN = 12


def unigram_nats(train: Sequence[Tokens], test: Sequence[Tokens], vocabulary_tokens: int) -> NDArray[np.float64]:
    """Returns -log p of each test token but the first of a document, under add-one counts.

    Returns:
        (n_scored_tokens,) float64, nats.
    """
    # The first token of a document is BOS in training and in test alike: it is given, never predicted.
    counts = np.bincount(np.concatenate([document[1:] for document in train]), minlength=vocabulary_tokens) + 1.0
    nats = -np.log(counts / counts.sum())
    return nats[np.concatenate([document[1:] for document in test])]


@dataclass(frozen=True)
class _Level:
    """Counts of one order: what follows each context of ``length`` tokens."""

    length: int
    grams: NDArray[np.uint64]  # (n_grams,) sorted: context and next token packed
    gram_counts: NDArray[np.float64]  # (n_grams,)
    contexts: NDArray[np.uint64]  # (n_contexts,) sorted
    context_counts: NDArray[np.float64]  # (n_contexts,) sum of the counts that follow
    context_discount: NDArray[np.float64]  # (n_contexts,) mass taken from them
    discounts: NDArray[np.float64]  # (4,) by min(count, 3); 0 for 0


class KneserNey:
    """Interpolated modified Kneser-Ney over tokens.

    Args:
        train: One array a document, (n_tokens,) uint16; n-grams do not cross documents.
        order: Tokens in the longest n-gram, at most 5: five of 12 bits are packed into one 64-bit key.
        vocabulary_tokens: At most 4096.
    """

    def __init__(self, train: Sequence[Tokens], order: int, vocabulary_tokens: int) -> None:
        if not 1 <= order <= 64 // _BITS_OF_A_TOKEN or vocabulary_tokens > 1 << _BITS_OF_A_TOKEN:
            raise ValueError(f"order {order} of {vocabulary_tokens} tokens does not fit: at most 5 and 4096")
        self.order = order
        self.vocabulary_tokens = vocabulary_tokens
        grams, counts = np.unique(_packed(train, order), return_counts=True)
        levels = [_level(order - 1, grams, counts)]
        for length in range(order - 2, -1, -1):
            # Lower orders count in how many different contexts an n-gram was seen (its left extensions). An n-gram that begins a
            # document has none that reaches further back: it keeps its plain count, as usual for sentence starts.
            grams, counts = np.unique(_without_first(grams, length + 2), return_counts=True)
            starts, start_counts = np.unique(_packed_starts(train, length + 1), return_counts=True)
            grams, counts = _added(grams, counts, starts, start_counts)
            levels.append(_level(length, grams, counts))
        self._levels = levels[::-1]

    def probabilities(self, documents: Sequence[Tokens]) -> NDArray[np.float64]:
        """Returns p(token | the tokens before it in its document) of every token but the first of each document.

        Returns:
            (n_scored_tokens,) float64.
        """
        next_tokens = np.concatenate([document[1:] for document in documents]).astype(np.uint64)
        available = np.concatenate([np.arange(1, len(document)) for document in documents])
        p = np.full(len(next_tokens), 1.0 / self.vocabulary_tokens)
        for level in self._levels:
            reach = available >= level.length
            contexts = np.concatenate([_contexts(document, level.length) for document in documents])
            p[reach] = _interpolated(level, contexts[reach], next_tokens[reach], p[reach])
        return p


def _interpolated(
    level: _Level, contexts: NDArray[np.uint64], tokens: NDArray[np.uint64], shorter: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns (c - D(c)) / c(context) + taken mass / c(context) * p of the shorter context, all (n,)."""
    rows, known = _found(level.contexts, contexts)
    grams = (contexts << np.uint64(_BITS_OF_A_TOKEN)) | tokens
    gram_rows, seen = _found(level.grams, grams)
    counts = np.where(seen, level.gram_counts[gram_rows], 0.0)
    discounted = counts - level.discounts[np.minimum(counts, 3).astype(int)]
    mixed = (discounted + level.context_discount[rows] * shorter) / level.context_counts[rows]
    return np.where(known, mixed, shorter)


def _level(length: int, grams: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Level:
    """Sums the counts by context and estimates the discounts."""
    n1, n2, n3, n4 = (float(max(1, np.count_nonzero(counts == k))) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # On a very small text the estimates may leave the range in which they make sense: a discount from c lies in 0..c.
    discounts = np.clip(discounts, 0.0, np.arange(4.0))
    contexts, starts = np.unique(grams >> np.uint64(_BITS_OF_A_TOKEN), return_index=True)
    taken = discounts[np.minimum(counts, 3)]
    return _Level(
        length=length,
        grams=grams,
        gram_counts=counts.astype(np.float64),
        contexts=contexts,
        context_counts=np.add.reduceat(counts.astype(np.float64), starts),
        context_discount=np.add.reduceat(taken, starts),
        discounts=discounts,
    )


def _contexts(document: Tokens, length: int) -> NDArray[np.uint64]:
    """Returns the last ``length`` tokens before each token but the first, packed: (n_tokens - 1,); missing ones count as 0."""
    packed = np.zeros(len(document) - 1, dtype=np.uint64)
    for back in range(length, 0, -1):
        earlier = np.zeros(len(document) - 1, dtype=np.uint64)
        earlier[back - 1 :] = document[: max(0, len(document) - back)]
        packed = (packed << np.uint64(_BITS_OF_A_TOKEN)) | earlier
    return packed


def _packed(documents: Sequence[Tokens], order: int) -> NDArray[np.uint64]:
    """Returns every n-gram of the order, packed."""
    parts = []
    for document in documents:
        grams = (_contexts(document, order - 1) << np.uint64(_BITS_OF_A_TOKEN)) | document[1:].astype(np.uint64)
        parts.append(grams[max(0, order - 2) :])
    return np.concatenate(parts)


def _packed_starts(documents: Sequence[Tokens], order: int) -> NDArray[np.uint64]:
    """Returns the n-gram that begins each document, packed; none for order 1, where it would be the given first token."""
    if order == 1:
        return np.empty(0, dtype=np.uint64)
    return np.concatenate([_packed([document[:order]], order) for document in documents])


def _without_first(grams: NDArray[np.uint64], order: int) -> NDArray[np.uint64]:
    """Returns n-grams of the order without their first token."""
    return grams & np.uint64((1 << (_BITS_OF_A_TOKEN * (order - 1))) - 1)


def _added(
    keys: NDArray[np.uint64], counts: NDArray[np.int64], more: NDArray[np.uint64], more_counts: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns the union of two tables of counts."""
    every = np.concatenate([keys, more])
    union, inverse = np.unique(every, return_inverse=True)
    summed = np.zeros(len(union), dtype=np.int64)
    np.add.at(summed, inverse, np.concatenate([counts, more_counts]))
    return union, summed


def _found(table: NDArray[np.uint64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Returns for each key its row in a sorted table, and whether it is there (row 0 where it is not)."""
    rows = np.searchsorted(table, keys)
    rows[rows == len(table)] = 0
    known = table[rows] == keys
    return np.where(known, rows, 0), known
