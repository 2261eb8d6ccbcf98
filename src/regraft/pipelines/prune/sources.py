"""Calibration windows: from one text, from several sources, or written by the model itself; and windows beside them that judge each source.

Without any text all windows are the model's own (:mod:`regraft.data.own_text`); beside a single text a share of them, if asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.data.calibration import BUILT_IN, SELF, Source, counts_of, mixed, sources_in
from regraft.data.own_text import write_own_text
from regraft.data.text import Corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import DataError, InputError
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.precision import float32_on_cpu
from regraft.numerics.divergence import log_probabilities, mean_divergence
from regraft.pipelines.prune.effort import EFFORTS
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.pipelines.texts import Texts, made_from_seedling, text_for
from regraft.progress import Say
from regraft.settings import CALIBRATION_TOKENS, PruneSettings

GIVEN = "the given text"


@dataclass(frozen=True)
class Part:
    """The windows of one source.

    Attributes:
        windows_NT: Token ids, int64 (windows, tokens).
        corpus: The text that they are drawn from; None where the model wrote them.
    """

    windows_NT: Tensor
    corpus: Corpus | None


@dataclass(frozen=True)
class Drawn:
    """Calibration windows, and where they come from.

    Attributes:
        windows_NT: Token ids, int64 (windows, tokens).
        source_N: Index of the source of each window, int64 (windows,); None where there is one source.
        judged: Source to windows that nothing is fitted to, int64 (windows, tokens); empty where there is one source.
        parts: The windows of each source.
    """

    windows_NT: Tensor
    source_N: Tensor | None
    judged: Mapping[str, Tensor]
    parts: tuple[Part, ...]

    @property
    def corpus(self) -> Corpus | None:
        """The text that was given, if it is a single one."""
        found = [part.corpus for part in self.parts if part.corpus is not None]
        return found[0] if len(found) == 1 else None


def check_own_text(settings: PruneSettings, given: Texts | None = None) -> None:
    """Refuses a share of own text that does nothing.

    Args:
        settings: The settings.
        given: Text that is in memory.

    Raises:
        InputError: There are several texts, or a bound of memory.
    """
    if not settings.own_text:
        return
    if settings.memory is not None:
        raise InputError("`own_text` is written by the whole model, which `memory` leaves no room for; leave one of the two out")
    if given is None and settings.calibration is not None and len(sources_in(settings.calibration)) > 1:
        raise InputError(f"`own_text` stands beside a single text; with several, write it among them: '{settings.calibration},self'")


def refuse_several(settings: PruneSettings) -> None:
    """Refuses several sources, and the model's own text, beside a bound of memory.

    Raises:
        InputError: They are given.
    """
    sources = sources_in(settings.calibration)
    if settings.calibration is not None and (len(sources) > 1 or any(source.name in (SELF, BUILT_IN) for source in sources)):
        raise InputError(f"`memory` takes one calibration file, not '{settings.calibration}'; give one file, or leave `memory` out")


def check_text_sources(loaded: Loaded, settings: PruneSettings) -> None:
    """Reads every text that is named, so that what is missing is said before anything starts.

    Raises:
        DataError: A source is missing or empty.
        InputError: The sources make no sense.
    """
    for source in _sources(loaded, settings, None):
        if source.name != SELF:
            _corpus(loaded, source.name, None)


def drawn_windows(loaded: Loaded, resolved: ResolvedPrune, given: Texts | None, say: Say) -> Drawn:
    """Draws the windows of every source by its share.

    Args:
        loaded: The model, with its tokenizer; in memory, if it writes.
        resolved: How many windows, how long, the sources and the seed.
        given: Text that is in memory, in place of a file.
        say: Called with one line when the model writes.

    Raises:
        InputError: There are more sources than windows, or the windows are longer than the model's context.
        DataError: A source is missing, empty or too short, or what the model writes runs in circles and there is no other text.
    """
    settings, seed = resolved.settings, resolved.seed
    seq_len = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "seq_len")
    sources = _sources(loaded, settings, given)
    beside = len(sources) > 1 and settings.own_text > 0.0
    if beside and settings.samples < len(sources):
        sources = sources[:1]
    own: Tensor | None = None
    spare = EFFORTS[settings.effort].source_windows if len(sources) > 1 else 0
    counts = counts_of(sources, settings.samples)
    if SELF in [source.name for source in sources]:
        own = _own(loaded, dict(zip(sources, counts, strict=True)), spare, seq_len, seed, say, needed=not beside)
        if own is None:
            sources, counts, spare = sources[:1], (settings.samples,), 0
    corpora = [None if source.name == SELF else _corpus(loaded, source.name, given) for source in sources]
    parts: list[Part] = []
    judged: dict[str, Tensor] = {}
    for source, count, corpus in zip(sources, counts, corpora, strict=True):
        found = own if corpus is None else calibration_windows(corpus, require_tokenizer(loaded), count + spare, seq_len, seed)
        assert found is not None
        parts.append(Part(found[:count], corpus))
        if len(found) > count and spare:
            judged["own text" if source.name == SELF else source.name] = found[count:]
    windows = mixed([source.name for source in sources], [part.windows_NT for part in parts], seed)
    return Drawn(windows.tokens_NT, windows.source_N if len(sources) > 1 else None, judged, tuple(parts))


def counted_texts(loaded: Loaded, settings: PruneSettings, given: Texts | None) -> list[tuple[Corpus, float]]:
    """Returns the texts whose tokens are counted, each with its share.

    Raises:
        InputError: The model's own text is among them, which is too short to count on.
        DataError: There is no text, or one is missing or empty.
    """
    if given is not None or settings.calibration is None:
        return [(text_for(loaded, given, "validation", "calibration"), 1.0)]
    sources = sources_in(settings.calibration)
    if SELF in [source.name for source in sources]:
        raise InputError("`calibration=self` is too short to count tokens on; give texts, such as `calibration=a.txt,b.txt`")
    return [(_corpus(loaded, source.name, None), source.share) for source in sources]


def _sources(loaded: Loaded, settings: PruneSettings, given: Texts | None) -> tuple[Source, ...]:
    """Returns the sources by name, the model's own text beside a single one included."""
    if given is not None:
        named = (Source(GIVEN, 1.0),)
    elif settings.calibration is None:
        named = (Source(BUILT_IN if made_from_seedling(loaded.source, loaded.provenance) else SELF, 1.0),)
    else:
        named = sources_in(settings.calibration)
    share = settings.own_text
    if len(named) == 1 and share > 0 and named[0].name != SELF:
        return (Source(named[0].name, 1.0 - share), Source(SELF, share))
    return named


def _corpus(loaded: Loaded, name: str, given: Texts | None) -> Corpus:
    if name == GIVEN and given is not None:
        return text_for(loaded, given, "validation", "calibration")
    return text_for(loaded, None if name == BUILT_IN else name, "validation", "calibration")


def _own(loaded: Loaded, counts: Mapping[Source, int], spare: int, seq_len: int, seed: int, say: Say, *, needed: bool) -> Tensor | None:
    """Returns the windows that the model writes, or None where they run in circles and another text is there."""
    count = next(count for source, count in counts.items() if source.name == SELF)
    others = ", ".join(source.name for source in counts if source.name != SELF)
    beside = "" if needed else f", beside {others}"
    say(f"the model writes {count} windows of {seq_len} tokens to calibrate on{beside}")
    with float32_on_cpu(loaded.model):
        own = write_own_text(loaded.model, loaded.tokenizer, count + spare, seq_len, seed)
    if not own.degenerate:
        return own.windows_NT
    circles = f"the model's own text runs in circles: {own.repeated:.0%} of its runs of four tokens are repeats"
    if needed:
        raise DataError(f"{circles}; give calibration text in the place of 'self'")
    say(f"{circles}; it is left out, and {others} calibrates alone")
    return None


@torch.no_grad()
def by_source(dense: PreTrainedModel, pruned: PreTrainedModel, judged: Mapping[str, Tensor]) -> str | None:
    """Returns a line on how far the predictions moved on held-out text of each source; None with fewer than two sources."""
    if len(judged) < 2:
        return None
    moved: dict[str, float] = {}
    with float32_on_cpu(dense), float32_on_cpu(pruned):
        for name, windows in judged.items():
            ids = windows.to(dense.device)
            before = log_probabilities(dense(input_ids=ids, use_cache=False).logits)
            moved[Path(name).name] = mean_divergence([pruned(input_ids=ids, use_cache=False).logits], [before])
    worst = max(moved, key=lambda name: moved[name])
    parts = ", ".join(f"{name} {value:.3f}" for name, value in moved.items())
    return f"worst of the calibration's sources: {worst}, divergence {moved[worst]:.3f} nats a token on held-out windows ({parts})"
