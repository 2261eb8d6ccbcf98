"""A held-out slice of the known entries, and a search along its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.completion.entries import EntryList
from regraft.errors import DataError, InputError
from regraft.numerics.checks import checked_number

RISES = 2
"""A search ends when the held-out error has not fallen this many times in a row."""


@dataclass(frozen=True)
class Slices:
    """Known entries in two parts.

    Attributes:
        fitted: The entries to fit.
        held: Rows, columns and values of the held-out entries.
    """

    fitted: EntryList
    held: tuple[Tensor, Tensor, Tensor]

    def squared_errors(self, predicted: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns the squared error of each held-out entry."""
        rows, columns, values = self.held
        return (predicted(rows, columns) - values).square()

    def rmse(self, predicted: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Returns the root mean squared error on the held-out entries."""
        return float(self.squared_errors(predicted).mean().sqrt())


def hold_out(entries: EntryList, fraction: float, generator: torch.Generator) -> Slices:
    """Splits entries at random.

    Args:
        entries: At least two.
        fraction: Share of the entries to hold out, in (0, 1); at least one entry goes to each side.
        generator: A generator on the CPU.

    Raises:
        InputError: The fraction is out of range.
        DataError: There are too few entries.
    """
    checked_number(fraction, "held-out fraction", above=True)
    if fraction >= 1:
        raise InputError(f"held-out fraction {fraction:g} is not below 1; give a share of the entries such as 0.1")
    if entries.count < 2:
        raise DataError(f"{entries.count} known entry cannot be split; give at least 2")
    order = torch.randperm(entries.count, generator=generator).to(entries.device)
    count = min(max(1, round(fraction * entries.count)), entries.count - 1)
    held, kept = order[:count], order[count:]
    fitted = EntryList(entries.rows[kept], entries.columns[kept], entries.values[kept], entries.shape)
    return Slices(fitted, (entries.rows[held], entries.columns[held], entries.values[held]))


def least(candidates: Iterable[float], error: Callable[[float], float], rises: int = RISES) -> tuple[float, float]:
    """Tries candidates in order until the error has not fallen ``rises`` times in a row; returns the best one and its error."""
    best, lowest, worse = math.nan, math.inf, 0
    for candidate in candidates:
        found = error(candidate)
        if found < lowest:
            best, lowest, worse = candidate, found, 0
        else:
            worse += 1
        if worse >= rises:
            break
    return best, lowest
