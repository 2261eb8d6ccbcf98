"""Texts of values in one short line, for ``repr``: a plan of a large model has thousands of numbers that nobody reads on a screen."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from dataclasses import fields
from pathlib import PurePath
from typing import Any

LONGEST = 199
_PLAIN = reprlib.Repr()
_PLAIN.maxstring = _PLAIN.maxother = _PLAIN.maxlong = 40


def in_short(value: Any) -> str:
    """Returns a dataclass as its name and its attributes, those of many values by their number, in less than 200 characters.

    >>> from dataclasses import dataclass
    >>> @dataclass(repr=False)
    ... class Plan:
    ...     ratio: float
    ...     cuts: tuple[int, ...]
    >>> in_short(Plan(0.2, tuple(range(5000))))
    'Plan(ratio=0.2, cuts=<5000 values>)'
    """
    return named(type(value).__name__, {field.name: getattr(value, field.name) for field in fields(value) if field.repr})


def named(name: str, values: dict[str, Any]) -> str:
    """Returns a name and values as ``Name(a=1, b=2)``, without the last ones where they would not fit."""
    text = f"{name}({', '.join(f'{key}={_shown(value)}' for key, value in values.items())})"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}...)"


def _shown(value: Any) -> str:
    match value:
        case PurePath():
            return _PLAIN.repr(str(value))
        case None | str() | int() | float():
            return _PLAIN.repr(value)
        case bytes():
            return "<bytes>"
        case Collection() if len(value) <= 3 and all(map(_is_short, value)):
            return _PLAIN.repr(value)
        case Collection():
            return f"<{len(value)} values>"
        case _:
            return f"<{type(value).__name__}>"


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float)
