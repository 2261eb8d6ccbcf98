"""Which GGUF architectures there are for a model, what each can hold, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regraft.errors import InputError
from regraft.export.gguf.llama_like import TWO_NORMS, Gated, lay_out
from regraft.export.gguf.source import Layout, Source


@dataclass(frozen=True)
class Architecture:
    """One architecture of the runtime, as an exporter sees it.

    Attributes:
        name: As the file says it.
        families: Model types that it computes.
        uneven: What may differ from layer to layer, in words; empty for nothing.
        refusal: Why it cannot hold a model of these families; empty where it can.
        lay_out: Gives the file.
        lost: What the model has no longer in it, or what it costs.
        asked_for: Whether it is taken only by name.
    """

    name: str
    families: tuple[str, ...]
    uneven: str
    refusal: Callable[[Source], str]
    lay_out: Callable[[Source], Layout]
    lost: str = "nothing"
    asked_for: bool = False


def _uneven(source: Source) -> str:
    """Returns why an architecture of equal layers cannot hold a model."""
    return "" if source.is_uniform else "its layers must be alike"


def _anything(source: Source) -> str:
    return ""


def _silu(source: Source) -> str:
    activation = getattr(source.config, "hidden_act", None) or getattr(source.config, "hidden_activation", None)
    return "" if activation in ("silu", "swish") else f"it computes silu, the model {activation}"


def _both(*rules: Callable[[Source], str]) -> Callable[[Source], str]:
    return lambda source: next((reason for rule in rules if (reason := rule(source))), "")


def _gated(kind: Gated, families: str, refusal: Callable[[Source], str], uneven: str = "", **more: Any) -> Architecture:
    return Architecture(kind.name, tuple(families.split()), uneven, refusal, lambda source: lay_out(kind, source), **more)


PER_LAYER = "query heads, key-value heads, feed-forward width"
WINDOWLESS = "a sliding window: the context ends where it does"
ZEROS = f"{WINDOWLESS}; zeros stand for the attention of layer 0, or a feed-forward network alone, where they were removed"

ARCHITECTURES: tuple[Architecture, ...] = (
    _gated(Gated("llama", TWO_NORMS, permuted=True), "llama mistral", _both(_uneven, _silu), lost=WINDOWLESS),
    _gated(Gated("qwen2", TWO_NORMS), "qwen2", _both(_uneven, _silu), lost=WINDOWLESS),
    _gated(Gated("qwen3", TWO_NORMS), "qwen3", _both(_uneven, _silu), lost=WINDOWLESS),
    _gated(
        Gated("deci", TWO_NORMS, permuted=True, per_layer=True),
        "llama mistral qwen2",
        _silu,
        f"{PER_LAYER}; attention or feed-forward network removed",
        lost=ZEROS,
    ),
)


def architectures_for(family: str) -> tuple[Architecture, ...]:
    """Returns the architectures that compute a family, the plainest first."""
    return tuple(entry for entry in ARCHITECTURES if family in entry.families)


def choose(source: Source, wanted: str = "") -> Architecture:
    """Returns the first architecture that holds a model.

    Args:
        source: The model.
        wanted: Name of the one to take; empty for any that need not be asked for.

    Raises:
        InputError: None does; the message says why, and what holds the model.
    """
    known = architectures_for(source.kind)
    if not known:
        families = sorted({family for entry in ARCHITECTURES for family in entry.families})
        raise InputError(f"family '{source.kind}' has no GGUF form here (known: {', '.join(families)}); export --to hf")
    if wanted and wanted not in [entry.name for entry in known]:
        raise InputError(f"GGUF architecture '{wanted}' does not compute family '{source.kind}'; choose {', '.join(e.name for e in known)}")
    reasons: list[str] = []
    for entry in known:
        if wanted not in ("", entry.name):
            continue
        reason = entry.refusal(source)
        if not reason and (wanted or not entry.asked_for):
            return entry
        reasons.append(f"{entry.name}: {reason or 'taken only when asked for by name'}")
    raise InputError(
        f"no GGUF architecture holds this {source.kind} ({'; '.join(reasons)}); export --to hf, or --to hf-uniform and then that --to gguf"
    )
