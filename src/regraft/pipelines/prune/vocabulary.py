"""Pruning of a vocabulary: which tokens stay, and the model and the tokenizer of these.

Texts of kept tokens keep their tokens and their probabilities but for the share of the tokens that are gone; every other text is
encoded with more tokens. Vocabulary trimming as in Abdaoui et al., arXiv 2010.05609, and Ushio et al., arXiv 2305.15020, with the closure
under merges that byte-pair encoding needs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.text import Corpus
from regraft.errors import InputError, ModelError, did_you_mean, shown
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.tokenizer import PROBE
from regraft.models.vocabulary import Vocabulary, smaller_tokenizer, vocabulary_of
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.plans import Cut, Groups, PrunePlan
from regraft.progress import Say
from regraft.reading import read_bytes
from regraft.settings import PruneSettings
from regraft.surgery.vocabulary import VOCABULARY, cut_vocabulary, ids_of_configs, vocabulary_groups

# A conversation of which chat templates write every part of theirs that is not a special token.
_CHAT = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}, {"role": "user", "content": "."}]


@dataclass(frozen=True)
class PrunedVocabulary:
    """A model and a tokenizer with fewer tokens.

    Attributes:
        plan: The tokens that stay, by their old ids.
        model: The smaller model; None after a dry run.
        tokenizer: The smaller tokenizer; None after a dry run.
        groups: The group of all tokens.
        resolved: The settings.
        notes: Remarks for the user, a line each.
    """

    plan: PrunePlan
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    groups: Groups
    resolved: ResolvedPrune
    notes: tuple[str, ...]


def of_vocabulary(settings: PruneSettings) -> bool:
    """Returns whether the vocabulary alone is cut.

    Raises:
        InputError: It is not said how far; or it is cut beside other targets, and something does not go with that.
    """
    asked = [name for name in ("vocabulary_size", "keep_tokens") if getattr(settings, name) is not None]
    if "vocabulary" not in settings.targets:
        if asked:
            raise InputError(f"`{asked[0]}` is for `targets=vocabulary`; leave it out, or name that target")
        return False
    if set(settings.targets) != {"vocabulary"}:
        _check_beside(settings, asked)
        return False
    if len(asked) != 1:
        raise InputError("`targets=vocabulary` takes `vocabulary_size`, a number of tokens, or `keep_tokens`, a file of them: give one")
    if settings.memory is not None:
        raise InputError("`memory` is not for `targets=vocabulary`, which needs no more than the model itself; leave it out")
    return True


def _check_beside(settings: PruneSettings, asked: list[str]) -> None:
    """Refuses what does not go with a vocabulary that is cut beside other targets, in one budget with them.

    Raises:
        InputError: As said.
    """
    others = ",".join(target for target in settings.targets if target != "vocabulary")
    alone = f"or prune with `targets=vocabulary` first, and the result with `targets={others}`"
    if asked:
        raise InputError(
            f"`{asked[0]}` is for `targets=vocabulary` alone, beside other targets `ratio` counts for all; leave it out, {alone}"
        )
    if "residual" in settings.targets:
        raise InputError(f"`targets=vocabulary,residual` share weights, as a token is a row as wide as the stream; leave one out, {alone}")
    if settings.memory is not None:
        raise InputError(f"`memory` leaves no room to measure what tokens are worth beside `targets={others}`; leave it out, {alone}")
    if settings.rounds > 1:
        raise InputError(f"`rounds={settings.rounds}` does not go with a vocabulary beside other targets; use `rounds=1`, {alone}")
    if settings.budget == "milliseconds":
        raise InputError("`budget=milliseconds` does not know what tokens cost; use `budget=parameters` or `budget=bytes`")


def prune_vocabulary(
    loaded: Loaded,
    settings: PruneSettings,
    seed: int,
    plan: PrunePlan | None,
    texts: Callable[[], Sequence[tuple[Corpus, float]]],
    say: Say,
    *,
    dry_run: bool,
) -> PrunedVocabulary:
    """Cuts the vocabulary of a model and its tokenizer.

    Args:
        loaded: The model with its tokenizer; neither is changed.
        settings: The number of tokens, or the file of those that stay.
        seed: Seed for the record; nothing here is random.
        plan: A plan to replay; None to make one.
        texts: Function that reads the calibration texts, each with its share.
        say: Called with a line of progress at each step.
        dry_run: Whether only the plan is made.

    Raises:
        InputError: Fewer tokens are asked for than every text needs, or a file drops one of these.
        ModelError: There is no tokenizer, or its vocabulary cannot be cut.
    """
    tokenizer = require_tokenizer(loaded)
    vocabulary = vocabulary_of(tokenizer)
    groups = vocabulary_groups(loaded.model)
    needed = needed_tokens(vocabulary, loaded.model)
    resolved = ResolvedPrune(settings, seed, needs_text=settings.vocabulary_size is not None)
    if plan is None:
        if settings.keep_tokens is not None:
            kept, criterion = _listed(settings.keep_tokens, vocabulary, needed), "file"
        else:
            assert settings.vocabulary_size is not None
            say("counting the tokens of the calibration text")
            read = texts()
            counts = weighted([counted_tokens(corpus, tokenizer) for corpus, _ in read], [share for _, share in read])
            most = max(counts.values(), default=0.0)
            counts |= dict.fromkeys(template_tokens(tokenizer), most + 1.0)
            kept, criterion = _most_used(settings.vocabulary_size, vocabulary, needed, counts), "frequency"
        plan = _plan(groups, kept, criterion, resolved)
    kept = plan.cuts[0].kept
    notes = (f"{len(needed):,} of the {len(kept):,} tokens are special, or every text needs them",)
    if dry_run:
        return PrunedVocabulary(plan, None, None, groups, resolved, notes)
    say("cutting the vocabulary")
    smaller = checked_tokenizer(tokenizer, vocabulary, kept)
    return PrunedVocabulary(plan, cut_vocabulary(loaded.model, groups, plan), smaller, groups, resolved, notes)


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, kept: tuple[int, ...]) -> PreTrainedTokenizerBase:
    """Returns a tokenizer of some of the tokens, compared with the whole one.

    Raises:
        ModelError: It encodes otherwise.
    """
    smaller = smaller_tokenizer(tokenizer, vocabulary, kept)
    _check(tokenizer, smaller, kept)
    return smaller


def needed_tokens(vocabulary: Vocabulary, model: PreTrainedModel) -> set[int]:
    """Returns the tokens that always stay: special ones, those that the configs name, and those without which some text has no tokens."""
    named = ids_of_configs(model)
    return {part for token in vocabulary.alphabet | named for part in vocabulary.with_parts(token)} | set(vocabulary.special)


def counted_tokens(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    """Returns how often each token occurs in a text."""
    counts: Counter[int] = Counter()
    for document in (*corpus.documents, *(part for record in corpus.records for part in record.texts)):
        counts.update(tokenizer.encode(document, add_special_tokens=False))
    return counts


def weighted(counts: Sequence[Counter[int]], shares: Sequence[float]) -> dict[int, float]:
    """Returns the numbers of tokens of several texts together, so that each text has its share of all, however long it is.

    Args:
        counts: Token to its number, for each text.
        shares: Of each text, above 0; in any unit.
    """
    totals = [max(1, one.total()) for one in counts]
    found: dict[int, float] = {}
    for one, share, own in zip(counts, shares, totals, strict=True):
        weight = (share / sum(shares)) * (sum(totals) / own)
        for token, count in one.items():
            found[token] = found.get(token, 0.0) + weight * count
    return found


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that a chat template writes itself; none without a template, or with one that refuses a short conversation."""
    if not tokenizer.chat_template:
        return set()
    try:
        written = tokenizer.apply_chat_template(_CHAT, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may refuse any conversation
        return set()
    return set(tokenizer.encode(str(written), add_special_tokens=False))


def _most_used(size: int, vocabulary: Vocabulary, needed: set[int], counts: Mapping[int, float]) -> list[int]:
    """Returns the needed tokens and the most frequent others, each with its parts; then those with the lowest ids.

    Raises:
        InputError: More tokens are needed, or the tokenizer has not so many.
    """
    if size < len(needed):
        raise InputError(f"`vocabulary_size={size}` is too small: {len(needed):,} tokens are special, or every text needs them; give more")
    if size >= len(vocabulary.tokens):
        raise InputError(f"`vocabulary_size={size}` removes nothing from {len(vocabulary.tokens):,} tokens; give less")
    kept = set(needed)
    used = sorted(counts, key=lambda token: (-counts[token], token))
    for token in (*used, *sorted(vocabulary.tokens)):
        if len(kept) == size:
            break
        parts = vocabulary.with_parts(token) - kept
        if len(kept) + len(parts) <= size:
            kept |= parts
    return sorted(kept)


def _listed(path: Path, vocabulary: Vocabulary, needed: set[int]) -> list[int]:
    """Returns the tokens of a file with their parts and the needed ones.

    Raises:
        InputError: The file drops a special token, or names a token that the tokenizer has not.
    """
    wanted = set(_tokens_in(path, vocabulary))
    dropped = sorted(token for token in vocabulary.special if token not in wanted)
    if dropped:
        raise InputError(
            f"'{path}' drops the special token '{vocabulary.special[dropped[0]]}' ({len(dropped)} in all), without which the model does "
            "not work as it was trained; add it"
        )
    kept = needed | {part for token in wanted for part in vocabulary.with_parts(token)}
    if len(kept) == len(vocabulary.tokens):
        raise InputError(f"'{path}' keeps all {len(kept):,} tokens; leave some out")
    return sorted(kept)


def _tokens_in(path: Path, vocabulary: Vocabulary) -> Iterable[int]:
    text = read_bytes(path).decode("utf-8", errors="replace")
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") and path.suffix == ".json" else text.splitlines()
    except ValueError:
        raise InputError(f"'{path}' is not valid JSON; write a list of tokens and ids, or one token a line in a .txt file") from None
    for entry in entries:
        number = entry if isinstance(entry, int) else vocabulary.ids.get(entry) if isinstance(entry, str) else None
        if entry == "":
            continue
        if number not in vocabulary.tokens:
            meant = did_you_mean(str(entry), vocabulary.ids) if len(vocabulary.ids) < 1000 else ""
            raise InputError(
                f"'{path}' names '{shown(str(entry))}', which is no token of this model; write it as tokenizer.json does{meant}"
            )
        yield number


def _plan(groups: Groups, kept: list[int], criterion: str, resolved: ResolvedPrune) -> PrunePlan:
    gone = groups.groups[0].units - len(kept)
    after = groups.parameters - gone * groups.groups[0].unit_parameters
    return PrunePlan(
        fingerprint=groups.fingerprint,
        criterion=criterion,
        selection=VOCABULARY,
        shape="uniform",
        ratio=1.0 - after / groups.parameters,
        align=1,
        parameters_before=groups.parameters,
        parameters_after=after,
        cuts=(Cut(VOCABULARY, tuple(kept)),),
        made_with={"settings": resolved.record(), "seed": resolved.seed, "windows_sha256": None},
    )


def _check(tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, kept: tuple[int, ...]) -> None:
    """Compares the two tokenizers on a probe: a line whose tokens all stay has them still, and no line is lost.

    Raises:
        ModelError: They differ.
    """
    stays = set(kept)
    for line in (*PROBE.splitlines(), *PROBE.split()):
        before = tokenizer.encode(line, add_special_tokens=False)
        after = [kept[new] for new in smaller.encode(line, add_special_tokens=False)]
        same = after == before if stays >= set(before) else tokenizer.decode(after) == tokenizer.decode(before)
        if not same:
            raise ModelError(f"the tokenizer {type(tokenizer).__name__} encodes '{shown(line)}' otherwise with fewer tokens: it is not cut")
