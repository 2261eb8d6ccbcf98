"""Values that readers stumble over, and what is asked of every reader: it works, or says in one line what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from regraft.errors import RegraftError

SECONDS = 5.0
NASTY_TEXTS = [
    "",
    "x",
    "\x1b[31mred",
    "a\nerror: b",
    "\0",
    "[/red]",
    "\u202eabc",
    "9" * 5000,
    "~nosuchuser/x",
    "../../etc/passwd",
    "ÿ" * 300,
]
NASTY_VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**30, float("inf"), float("nan"), [], {}, [[]], {"a": [None]}, *NASTY_TEXTS]


def one_line(call: Callable[[], object], what: object) -> None:
    """Asserts that a call works or is refused in one safe line, within seconds of work; one that waits for ever meets pytest's limit."""
    started = time.process_time()
    try:
        call()
    except RegraftError as error:
        said = str(error)
        for line in said.split("\n") if hasattr(error, "problems") else [said]:
            assert line.isprintable(), (what, line[:200])
        assert len(said) < 20_000, what
    assert time.process_time() - started < SECONDS, what


def leaves(value: Any) -> Iterator[tuple[str | int, ...]]:
    """Yields the way to every leaf of nested objects and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(key, *way) for key, entry in pairs for way in leaves(entry)]
    yield from found or [()]


def with_leaf(value: Any, way: tuple[str | int, ...], leaf: Any) -> Any:
    if not way:
        return leaf
    changed_here = value.copy()
    changed_here[way[0]] = with_leaf(value[way[0]], way[1:], leaf)
    return changed_here
