"""Checks of counts, ranks and numbers; each error gives the value, the limit and the remedy in one line."""

from __future__ import annotations

import math
from typing import SupportsFloat, SupportsIndex

from regraft.errors import InputError


def checked_count(value: object, name: str, minimum: int = 1) -> int:
    """Returns ``value`` when it is a whole number of at least ``minimum``.

    Raises:
        InputError: It is not.
    """
    match value:
        case SupportsIndex() if value is not True and value is not False:
            count = value.__index__()
        case _:
            raise InputError(f"{name} {value!r} is not a whole number; give one of at least {minimum}")
    if count < minimum:
        raise InputError(f"{name} {count} is below {minimum}; give at least {minimum}")
    return count


def checked_rank(rank: object, rows: int, columns: int, name: str = "rank") -> int:
    """Returns a rank r whose compressed factorization, 2r wide, fits a ``rows`` x ``columns`` matrix.

    Raises:
        InputError: It is not a whole number, is below 1, or 2r exceeds the smaller side.
    """
    count = checked_count(rank, name)
    limit = min(rows, columns) // 2
    if not limit:
        raise InputError(f"a {rows} x {columns} matrix of known entries has nothing to factorize; give at least 2 rows and 2 columns")
    if count > limit:
        raise InputError(
            f"{name} {count} is too large for a {rows} x {columns} matrix: twice the {name} must fit its smaller side, "
            f"so at most {limit}; lower the {name}"
        )
    return count


def checked_number(value: object, name: str, minimum: float = 0.0, *, above: bool = False) -> float:
    """Returns ``value`` as a float when it is finite and at least (or, with ``above``, more than) ``minimum``.

    Raises:
        InputError: It is not.
    """
    limit = f"above {minimum:g}" if above else f"at least {minimum:g}"
    match value:
        case SupportsFloat() if value is not True and value is not False:
            number = float(value)
        case _:
            raise InputError(f"{name} {value!r} is not a number; give one {limit}")
    if not math.isfinite(number) or number < minimum or (above and number == minimum):
        raise InputError(f"{name} {number:g} is not allowed; give a finite number {limit}")
    return number
