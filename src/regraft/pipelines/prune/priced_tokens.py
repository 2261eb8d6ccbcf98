"""The vocabulary in one budget with other targets: what each token is worth, and the damage of keeping fewer of them.

A token that is gone is spelled by what is left. Its price, in nats for each byte of text, is predicted: its share of the calibration text,
times what spelling it by the two halves of its last merge costs in a unigram model of that text, ``log q(t) - log q(a) - log q(b)``. Prices
only rank the tokens. The damage of keeping the first so many is measured: documents that were not counted are encoded anew, and the loss on
them with the logits of the kept tokens alone, as the pruned model computes them, is compared with their loss before. (Windows of counted
documents say too little: a document repeats its rare words.) A difference of losses in nats a token is what the divergences of other groups
are on average, as long as the model's predictions are right, so that the knapsack adds them up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.text import split_corpus
from regraft.data.tokens import calibration_windows, context_limit
from regraft.errors import DataError
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.precision import float32_on_cpu
from regraft.models.vocabulary import Vocabulary, smaller_tokenizer, vocabulary_of
from regraft.pipelines.prune.sources import Part
from regraft.pipelines.prune.vocabulary import checked_tokenizer, counted_tokens, needed_tokens, template_tokens, weighted
from regraft.plans import Curve, Curves, Cut, Group, Groups, PrunePlan, Scores
from regraft.progress import Say, Step
from regraft.surgery.cut import parameters_after
from regraft.surgery.vocabulary import VOCABULARY, cut_vocabulary, token_group, vocabulary_groups

# Kept shares of the tokens that may go at which the damage is measured.
SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
JUDGED_WINDOWS = 16  # of all sources together, as far as the text reaches
HELD_OUT = 0.1  # share of each source whose tokens are not counted


@dataclass(frozen=True)
class _Text:
    """A text that judges: what is read, and what is predicted after it."""

    first: str
    rest: str


@dataclass(frozen=True)
class Judging:
    """Texts whose tokens were not counted, and what encodes them.

    Attributes:
        tokenizer: The whole tokenizer.
        vocabulary: Its vocabulary.
        texts: The texts, so short that they fit the context however they are spelled.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    texts: tuple[_Text, ...]

    @property
    def bytes(self) -> int:
        """Bytes of what is predicted."""
        return sum(len(text.rest.encode()) for text in self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of it, as the whole tokenizer counts."""
        return sum(len(self.tokenizer.encode(text.rest, add_special_tokens=False)) for text in self.texts)

    def nats(self, model: PreTrainedModel, kept: Sequence[int], *, whole: bool) -> float:
        """Returns the summed loss of the texts with the logits of some tokens alone.

        Args:
            model: A model with a row for every token.
            kept: Ids of the tokens, ascending.
            whole: Whether these are all.
        """
        tokenizer = self.tokenizer if whole else smaller_tokenizer(self.tokenizer, self.vocabulary, kept)
        return _loss(model, tokenizer, torch.tensor(kept), self.texts)


@dataclass(frozen=True)
class PricedTokens:
    """Tokens that may go, the dearest first.

    Attributes:
        whole: The group of all tokens.
        needed: Ids that always stay.
        order: Ids that may go; whoever keeps the first so many keeps with each the tokens that it is merged from.
        prices: Predicted loss in nats for each byte of text, one for each of ``order``, never rising.
        damage: Number of kept tokens of ``order``, ascending, to the measured loss in nats for each token of text.
        bytes_per_token: Mean length of a token of the text on which damage was measured.
        judging: That text.
    """

    whole: Group
    needed: frozenset[int]
    order: tuple[int, ...]
    prices: tuple[float, ...]
    damage: dict[int, float]
    bytes_per_token: float
    judging: Judging

    @property
    def group(self) -> Group:
        """The tokens of ``order`` as a group whose units are in this order; it shares no weights with others."""
        return Group(VOCABULARY, "vocabulary", None, len(self.order), (), self.whole.unit_parameters)

    def beside(self, groups: Groups) -> Groups:
        """Returns the groups with the tokens among them."""
        return replace(groups, groups=(*groups.groups, self.group))

    def scored(self, scores: Scores) -> Scores:
        """Returns the scores with the prices among them."""
        return replace(scores, values={**scores.values, VOCABULARY: self.prices})

    def drawn(self, curves: Curves, bytes_per_parameter: int) -> Curves:
        """Returns the curves with that of the tokens among them."""
        each = self.whole.unit_parameters * (1 if curves.unit == "parameters" else bytes_per_parameter)
        kept = tuple(self.damage)
        curve = Curve(kept, tuple(self.damage.values()), tuple(float(count * each) for count in kept))
        return replace(curves, fixed_cost=curves.fixed_cost - curve.cost[-1], values={**curves.values, VOCABULARY: curve})

    def in_ids(self, plan: PrunePlan) -> PrunePlan:
        """Returns a plan that names kept tokens by their ids, and not by their places in the order."""
        return replace(plan, cuts=tuple(self._by_ids(entry) if entry.group == VOCABULARY else entry for entry in plan.cuts))

    def _by_ids(self, entry: Cut) -> Cut:
        return Cut(VOCABULARY, tuple(sorted({*self.needed, *(self.order[unit] for unit in entry.kept)})))

    def loss(self, model: PreTrainedModel, plan: PrunePlan) -> float:
        """Returns the loss of a plan on text that was not counted, in nats for each byte.

        Args:
            model: The model with everything cut but tokens.
            plan: A plan that names tokens by their places in the order.
        """
        entry = next((self._by_ids(entry) for entry in plan.cuts if entry.group == VOCABULARY), None)
        kept = range(self.whole.units) if entry is None else entry.kept
        return self.judging.nats(model, kept, whole=entry is None) / max(1, self.judging.bytes)

    def note(self, plan: PrunePlan) -> str:
        """Returns a line on what was chosen."""
        cut = next((entry for entry in plan.cuts if entry.group == VOCABULARY), None)
        if cut is None:
            return "all tokens stay: to cut the other targets moves the predictions less, by measured damage"
        counts = sorted(self.damage)
        kept = len(cut.kept) - len(self.needed)
        above = next(count for count in counts if count >= kept)
        most = max(0.0, self.damage[above]) / self.bytes_per_token
        below = max((count for count in counts if count <= kept), default=above)
        least = max(0.0, self.damage[below]) / self.bytes_per_token
        return (
            f"{self.whole.units - len(cut.kept):,} of {self.whole.units:,} tokens go, for {min(most, least):.4f} to {max(most, least):.4f} "
            "nats a byte on text that they were not counted on"
        )


def priced_tokens(loaded: Loaded, parts: Sequence[Part], seed: int, say: Say) -> PricedTokens:
    """Returns the tokens of a model that may go, with their prices and the damage.

    Args:
        loaded: The model with its tokenizer.
        parts: The calibration windows of each source. A source counts as much as it has windows, however long its text is.
        seed: Seed for the documents that judge.
        say: Called with a line of progress at each step.

    Raises:
        ModelError: There is no tokenizer, or the vocabulary cannot be cut.
    """
    model, tokenizer = loaded.model, require_tokenizer(loaded)
    vocabulary = vocabulary_of(tokenizer)
    whole = token_group(model)
    written = {part for token in template_tokens(tokenizer) for part in vocabulary.with_parts(token)}
    needed = frozenset(needed_tokens(vocabulary, model) | written)
    say("counting the tokens of the calibration text")
    counts, judged = counted_and_judged(parts, tokenizer, seed)
    order, prices = ranked_tokens(vocabulary, needed, counts, whole.units)
    fewest = smaller_tokenizer(tokenizer, vocabulary, sorted(needed))
    judging = Judging(tokenizer, vocabulary, tuple(_texts(judged, tokenizer, fewest, context_limit(model.config))))
    sizes = sorted({*(round(share * len(order)) for share in SHARES), len(order)})
    losses: dict[int, float] = {}
    for number, size in enumerate(sizes, start=1):
        whole_one = size == len(order)
        kept = range(whole.units) if whole_one else sorted({*needed, *order[:size]})
        losses[size] = judging.nats(model, kept, whole=whole_one)
        say(Step("measuring the damage of fewer tokens", number, len(sizes)))
    tokens = max(1, judging.tokens)
    damage = {size: (loss - losses[len(order)]) / tokens for size, loss in losses.items()}
    per_token = judging.bytes / tokens
    return PricedTokens(whole, needed, order, tuple(price / per_token for price in prices), damage, per_token, judging)


def counted_and_judged(parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[dict[int, float], list[list[int]]]:
    """Returns how often each token occurs, and windows of documents that were not counted.

    Args:
        parts: The calibration windows of each source, and its text.
        tokenizer: The model's tokenizer.
        seed: Seed for the documents that judge.

    Returns:
        Token to its number in all sources, each by its share of the windows; and windows of ids, in equal numbers of each source.
    """
    each = math.ceil(JUDGED_WINDOWS / len(parts))
    found = [_split(part, tokenizer, each, seed) for part in parts]
    counts = weighted([own for own, _ in found], [len(part.windows_NT) for part in parts])
    return counts, [ids for _, judged in found for ids in judged.tolist()]


def _split(part: Part, tokenizer: PreTrainedTokenizerBase, judging: int, seed: int) -> tuple[Counter[int], Tensor]:
    """Returns the counts of one source, and windows of its other documents; of the windows alone, where the text is too short for both."""
    if part.corpus is not None:
        try:
            counted, held_out = split_corpus(part.corpus, HELD_OUT, seed)
            judged = calibration_windows(held_out, tokenizer, judging, part.windows_NT.shape[1], seed)
        except DataError:
            pass
        else:
            return counted_tokens(counted, tokenizer), judged
    judged = part.windows_NT[-max(1, min(judging, len(part.windows_NT) // 4)) :]
    counts = Counter(part.windows_NT.flatten().tolist()) if part.corpus is None else counted_tokens(part.corpus, tokenizer)
    counts.subtract(judged.flatten().tolist())
    return +counts, judged


def ranked_tokens(
    vocabulary: Vocabulary, needed: Iterable[int], counts: Mapping[int, float], rows: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Returns the tokens that may go, the dearest first, each after those that it is merged from, and prices that never rise.

    Args:
        vocabulary: The vocabulary.
        needed: Ids that always stay.
        counts: Token to its number in a text; tokens that are not in it may be missing.
        rows: Rows of the embedding; those without a token come last.

    Returns:
        Ids, and prices in nats for each token of the text.
    """
    total = sum(counts.values())
    surprisal = {token: -math.log((counts.get(token, 0.0) + 1) / (total + rows)) for token in vocabulary.tokens}
    usual = sum(count * surprisal.get(token, 0.0) for token, count in counts.items()) / max(1, total)

    def price(token: int) -> float:
        halves = vocabulary.halves(token)
        extra = usual if halves is None else sum(surprisal[half] for half in halves) - surprisal[token]
        return counts.get(token, 0.0) / max(1, total) * max(0.0, extra)

    there = set(needed)
    order: list[int] = []
    own: list[float] = []
    prices = {token: price(token) if counts.get(token, 0.0) else 0.0 for token in vocabulary.tokens}
    for token in sorted(vocabulary.tokens, key=lambda token: (-prices[token], token)):
        parts = sorted(vocabulary.with_parts(token) - there - {token}) + ([token] if token not in there else [])
        there.update(parts)
        order += parts
        own += [prices[token]] * len(parts)
    nameless = [row for row in range(rows) if row not in there]
    return (*order, *nameless), (*own, *(0.0 for _ in nameless))


def with_tokens(groups: Groups, model: PreTrainedModel) -> Groups:
    """Returns the groups of a model with that of all its tokens, by their ids."""
    return replace(groups, groups=(*groups.groups, token_group(model)))


def within_layers(groups: Groups, plan: PrunePlan) -> PrunePlan:
    """Returns what a plan removes besides tokens.

    Args:
        groups: Groups of the model, without tokens.
        plan: What stays.
    """
    cuts = tuple(entry for entry in plan.cuts if entry.group != VOCABULARY)
    return replace(plan, cuts=cuts, parameters_after=parameters_after(groups.shapes, groups, cuts))


def without_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: PrunePlan
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model and its tokenizer with the tokens that a plan keeps.

    Args:
        model: The model, of which everything else that the plan removes is gone.
        tokenizer: Its tokenizer.
        plan: What stays, tokens by their ids.
    """
    entry = next(entry for entry in plan.cuts if entry.group == VOCABULARY)
    groups = vocabulary_groups(model)
    part = replace(plan, fingerprint=groups.fingerprint, cuts=(entry,))
    return cut_vocabulary(model, groups, part), checked_tokenizer(tokenizer, vocabulary_of(tokenizer), entry.kept)


def _texts(
    windows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, smallest: PreTrainedTokenizerBase, limit: int | None
) -> list[_Text]:
    """Returns the texts of windows, so short that they fit a context however they are spelled."""
    found: list[_Text] = []
    for ids in windows:
        while len(ids) > 1:
            text = _Text(str(tokenizer.decode(ids[:1])), str(tokenizer.decode(ids[1:])))
            if not limit or len(_encoded(smallest, text)[0]) <= limit:
                found.append(text)
                break
            ids = ids[: len(ids) // 2]
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, text: _Text) -> tuple[list[int], int]:
    """Returns the ids of a text, and how many of them are read and not predicted."""
    first, rest = (tokenizer.encode(part, add_special_tokens=False) for part in (text.first, text.rest))
    return [*first, *rest], len(first)


@torch.no_grad()
def _loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept_V: Tensor, texts: Sequence[_Text]) -> float:
    """Returns the summed loss in nats of texts, encoded by a tokenizer of the kept tokens, with the logits of these alone."""
    total = 0.0
    kept_V = kept_V.to(model.device)
    with float32_on_cpu(model):
        for text in texts:
            ids, read = _encoded(tokenizer, text)
            if not read or len(ids) == read:
                continue
            there_T = torch.tensor(ids, device=model.device)
            logits_TV = model(input_ids=kept_V[there_T][None], use_cache=False).logits[0][read - 1 : -1, kept_V].double()
            total -= float(logits_TV.log_softmax(-1).gather(1, there_T[read:, None]).sum())
    return total
