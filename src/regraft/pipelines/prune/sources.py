"""Calibration windows from several sources, or written by the model itself."""

from __future__ import annotations

from regraft.data.calibration import BUILT_IN, SELF, Source, Windows, counts_of, mixed, sources_in
from regraft.data.own_text import write_own_text
from regraft.data.text import read_corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import DataError, InputError
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.precision import float32_on_cpu
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.progress import Say
from regraft.settings import CALIBRATION_TOKENS, PruneSettings


def several_sources(settings: PruneSettings) -> tuple[Source, ...]:
    """Returns the sources of the calibration text where they are more than one file.

    Raises:
        InputError: They make no sense, or there is a bound of memory.
    """
    sources = sources_in(settings.calibration)
    if settings.calibration is None or (len(sources) == 1 and sources[0].name not in (SELF, BUILT_IN)):
        return ()
    if settings.memory is not None:
        raise InputError(f"`memory` takes one calibration file, not '{settings.calibration}'; give one file, or leave `memory` out")
    return sources


def windows_of(loaded: Loaded, sources: tuple[Source, ...], resolved: ResolvedPrune, say: Say) -> Windows:
    """Draws the windows of every source by its share.

    Args:
        loaded: The model, in memory, with its tokenizer.
        sources: At least one.
        resolved: How many windows, how long, and the seed.
        say: Called with one line when the model writes.

    Raises:
        InputError: There are more sources than windows, or the windows are longer than the model's context.
        DataError: A source is missing, empty or too short, or what the model writes runs in circles.
    """
    settings, seed = resolved.settings, resolved.seed
    seq_len = window_tokens(settings.seq_len, CALIBRATION_TOKENS, loaded.model.config, "seq_len")
    counts = counts_of(sources, settings.samples)
    parts = []
    for source, count in zip(sources, counts, strict=True):
        if source.name != SELF:
            corpus = read_corpus(None if source.name == BUILT_IN else source.name, "validation")
            parts.append(calibration_windows(corpus, require_tokenizer(loaded), count, seq_len, seed))
            continue
        say(f"the model writes {count} windows of {seq_len} tokens to calibrate on")
        with float32_on_cpu(loaded.model):
            own = write_own_text(loaded.model, loaded.tokenizer, count, seq_len, seed)
        if own.degenerate:
            raise DataError(
                f"the model's own text runs in circles: {own.repeated:.0%} of its runs of four tokens are repeats; "
                "give calibration text in the place of 'self'"
            )
        parts.append(own.windows_NT)
    return mixed([source.name for source in sources], parts, seed)
