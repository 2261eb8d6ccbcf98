"""Calibration text from several sources, each with its share of the windows.

What a re-fit is fitted to is kept, and what is not in the text is spent: so text of every kind that the model is to keep belongs in it,
and every choice that is judged by held-out windows is judged by the source where it does worst.

Sources are written ``NAME=SHARE,NAME=SHARE``, or without shares for equal ones. A name is a file, ``built-in`` for the text that ships with
the package, or ``self`` for text that the model writes itself (:mod:`regraft.data.own_text`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.reading import is_there

SELF, BUILT_IN = "self", "built-in"


@dataclass(frozen=True)
class Source:
    """One source of calibration windows and its share.

    Attributes:
        name: A file, ``built-in`` or ``self``.
        share: Share of all windows, above 0; the shares of all sources add up to 1.
    """

    name: str
    share: float


@dataclass(frozen=True)
class Windows:
    """Calibration windows and the source of each.

    Attributes:
        tokens_NT: Token ids, int64 (windows, tokens).
        source_N: Index into ``names`` for each window, int64 (windows,).
        names: Names of the sources.
    """

    tokens_NT: Tensor
    source_N: Tensor
    names: tuple[str, ...]


def sources_in(text: str | Path | None) -> tuple[Source, ...]:
    """Returns the sources that a text names; a text that is the name of a file is that file, whatever signs are in it.

    Raises:
        InputError: A source has no name or stands twice, only some have shares, or the shares are not above 0 or do not add up to 1.

    >>> [(source.name, source.share) for source in sources_in("a.txt=0.75, self=0.25")]
    [('a.txt', 0.75), ('self', 0.25)]
    >>> [source.share for source in sources_in("a.txt,b.txt")]
    [0.5, 0.5]
    """
    if text is None:
        return (Source(BUILT_IN, 1.0),)
    whole = str(text)
    if is_there(Path(whole)) or not whole.strip():
        return (Source(whole, 1.0),)
    parts = [part.strip() for part in whole.split(",")]
    named = [part.rpartition("=") if "=" in part else (part, "", "") for part in parts]
    names = [name.strip() for name, _, _ in named]
    if not all(names):
        raise InputError(f"calibration '{whole}' has a source without a name; write NAME=SHARE,NAME=SHARE or NAME,NAME")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"calibration source '{twice}' stands twice; give it once, with the share of both")
    given = [share for _, _, share in named]
    if any(given) != all(given):
        raise InputError(f"calibration '{whole}' gives some of its sources a share and others none; give all of them one, or none")
    if not any(given):
        return tuple(Source(name, 1.0 / len(names)) for name in names)
    shares = [_share(share, whole) for share in given]
    if not math.isclose(sum(shares), 1.0, abs_tol=0.01):
        raise InputError(f"the shares of calibration '{whole}' add up to {sum(shares):g}; they must add up to 1")
    return tuple(Source(name, share / sum(shares)) for name, share in zip(names, shares, strict=True))


def _share(text: str, whole: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share > 0):
        raise InputError(f"'{text.strip()}' in calibration '{whole}' is not a share; write a number above 0, such as 0.5")
    return share


def counts_of(sources: Sequence[Source], samples: int) -> tuple[int, ...]:
    """Returns how many of ``samples`` windows each source gives: at least one, the others by largest remainder.

    Raises:
        InputError: There are more sources than windows.

    >>> counts_of(sources_in("a=0.7,b=0.2,c=0.1"), 8)
    (5, 2, 1)
    """
    if samples < len(sources):
        raise InputError(f"{samples} calibration windows are too few for {len(sources)} sources; raise samples, or give fewer sources")
    spare = samples - len(sources)
    exact = [max(0.0, samples * source.share - 1.0) for source in sources]
    scaled = [spare * value / (sum(exact) or 1.0) for value in exact]
    counts = [1 + int(value) for value in scaled]
    by_remainder = sorted(range(len(sources)), key=lambda index: (int(scaled[index]) - scaled[index], index))
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def mixed(names: Sequence[str], parts: Sequence[Tensor], seed: int) -> Windows:
    """Returns the windows of all sources in a random order, so that every part of them holds every source.

    Args:
        names: Names of the sources.
        parts: Windows of each source, int64 (windows, tokens). The windows of a single source keep their order.
        seed: Seed for the order.
    """
    tokens_NT = torch.cat(list(parts))
    source_N = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
    if len(parts) > 1:
        order = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))
        tokens_NT, source_N = tokens_NT[order], source_N[order]
    return Windows(tokens_NT, source_N, tuple(names))
