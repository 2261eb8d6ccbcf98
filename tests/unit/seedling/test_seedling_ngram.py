"""The baselines that seedling has to beat are what they are called."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from seedling.ngram import KneserNey, unigram_nats

VOCABULARY = 6


def random_documents(seed: int, count: int, length: int) -> list[np.ndarray]:
    """Documents of a chain that likes to go on by one, each beginning with the token 0."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        tokens = [0]
        for _ in range(length - 1):
            likely = tokens[-1] % (VOCABULARY - 1) + 1
            tokens.append(likely if generator.random() < 0.6 else int(generator.integers(1, VOCABULARY)))
        documents.append(np.array(tokens, dtype=np.uint16))
    return documents


class PlainKneserNey:
    """Interpolated modified Kneser-Ney with dictionaries and the formulas of Chen & Goodman, one n-gram at a time."""

    def __init__(self, documents: list[np.ndarray], order: int) -> None:
        self.order = order
        grams = {n: Counter() for n in range(1, order + 1)}
        for document in documents:
            tokens = [int(token) for token in document]
            for n in range(1, order + 1):
                for end in range(max(n, 2), len(tokens) + 1):
                    grams[n][tuple(tokens[end - n : end])] += 1
        self.counts: dict[int, Counter] = {order: grams[order]}
        for n in range(order - 1, 0, -1):
            left = Counter(gram[1:] for gram in grams[n + 1])
            if n > 1:
                left.update(tuple(int(t) for t in document[:n]) for document in documents)
            self.counts[n] = left

    def discount(self, n: int, count: int) -> float:
        if count == 0:
            return 0.0
        how_many = Counter(self.counts[n].values())
        n1, n2, n3, n4 = (max(1, how_many[k]) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        level = min(count, 3)
        value = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}[level]
        return min(max(value, 0.0), float(level))

    def probability(self, context: tuple[int, ...], token: int) -> float:
        n = min(self.order, len(context) + 1)
        p = 1.0 / VOCABULARY
        for k in range(1, n + 1):
            tail = context[len(context) - (k - 1) :]
            following = {gram[-1]: count for gram, count in self.counts[k].items() if gram[:-1] == tail}
            if not following:
                continue
            total = sum(following.values())
            taken = sum(self.discount(k, count) for count in following.values())
            count = following.get(token, 0)
            p = (count - self.discount(k, count)) / total + taken / total * p
        return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_equals_the_formula_written_plainly(order: int) -> None:
    train, test = random_documents(1, 6, 60), random_documents(2, 3, 25)
    ours = KneserNey(train, order, VOCABULARY).probabilities(test)
    plain = PlainKneserNey(train, order)
    expected = [
        plain.probability(tuple(int(t) for t in document[:end]), int(document[end])) for document in test for end in range(1, len(document))
    ]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_probabilities_of_all_tokens_sum_to_one_after_known_and_unknown_contexts() -> None:
    model = KneserNey(random_documents(3, 5, 80), 5, VOCABULARY)
    for context in ([0], [0, 1, 2, 3], [0, 5, 5, 5, 5], [0, 0, 0, 0, 0]):
        p = [model.probabilities([np.array([*context, token], dtype=np.uint16)])[-1] for token in range(VOCABULARY)]
        assert math.isclose(sum(p), 1.0, rel_tol=1e-12)
        assert min(p) > 0


def test_longer_contexts_help_where_the_text_has_them_and_do_not_where_it_has_none() -> None:
    train, test = random_documents(4, 40, 200), random_documents(5, 5, 200)
    chain = {order: -np.log(KneserNey(train, order, VOCABULARY).probabilities(test)).mean() for order in (1, 2)}
    assert chain[2] < chain[1] - 0.2
    generator = np.random.default_rng(6)
    noise = [generator.integers(1, VOCABULARY, 4000).astype(np.uint16) for _ in range(2)]
    five = -np.log(KneserNey(noise[:1], 5, VOCABULARY).probabilities(noise[1:])).mean()
    assert five > math.log(VOCABULARY - 1) - 0.01  # nothing can be won on noise


def test_unigram_is_add_one_over_the_tokens_that_are_scored() -> None:
    train = [np.array([0, 1, 1, 2], dtype=np.uint16), np.array([0, 1], dtype=np.uint16)]
    nats = unigram_nats(train, [np.array([0, 1, 3], dtype=np.uint16)], 4)
    np.testing.assert_allclose(np.exp(-nats), [(3 + 1) / (4 + 4), (0 + 1) / (4 + 4)])


def test_what_does_not_fit_into_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 5 and 4096"):
        KneserNey(random_documents(1, 1, 10), 6, VOCABULARY)
    with pytest.raises(ValueError, match="at most 5 and 4096"):
        KneserNey(random_documents(1, 1, 10), 5, 4097)
