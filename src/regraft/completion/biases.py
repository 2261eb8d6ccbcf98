"""Mean and biases of ratings: a row or column that deviates, shrunk where it has few entries.

References:
    [KOR09] Koren, Bell, Volinsky, "Matrix factorization techniques for recommender systems", Computer 42 (2009), equation 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.completion.entries import EntryList
from regraft.numerics.checks import checked_number

SWEEPS = 200
SETTLED = 1e-9
"""Sweeps end when no bias moves by more than this times the largest deviation from the mean."""


@dataclass(frozen=True)
class Biases:
    """The prediction mean + rows[i] + columns[j].

    Attributes:
        mean: Mean of all entries.
        rows: m deviations; 0 for a row without entries.
        columns: n deviations; 0 for a column without entries.
    """

    mean: float
    rows: Tensor
    columns: Tensor

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns the predictions for pairs of indices."""
        return self.mean + self.rows[rows] + self.columns[columns]


def mean_only(entries: EntryList) -> Biases:
    """Returns the mean of the entries with no deviations."""
    rows, columns = entries.shape
    none = entries.values.new_zeros
    return Biases(float(entries.values.mean()), none(rows), none(columns))


def fit_biases(entries: EntryList, shrinkage: float) -> Biases:
    """Minimises sum (y - mean - a_i - b_j)^2 + shrinkage (|a|^2 + |b|^2) by turns ([KOR09], equation 3, at the mean of the values).

    Args:
        entries: The known entries.
        shrinkage: Number of imagined entries of zero deviation that each row and column gets, above 0. At 0 the solution would not be
            unique: a constant could move from all rows to all columns.

    Raises:
        InputError: The shrinkage is out of range.
    """
    checked_number(shrinkage, "shrinkage", above=True)
    mean = float(entries.values.mean())
    centred = entries.values - mean
    size_rows, size_columns = entries.shape
    row_weight = torch.bincount(entries.rows, minlength=size_rows) + shrinkage
    column_weight = torch.bincount(entries.columns, minlength=size_columns) + shrinkage
    rows, columns = centred.new_zeros(size_rows), centred.new_zeros(size_columns)
    limit = SETTLED * max(float(centred.abs().max()), torch.finfo(torch.float64).tiny)
    for _ in range(SWEEPS):
        new_columns = centred.new_zeros(size_columns).index_add_(0, entries.columns, centred - rows[entries.rows]) / column_weight
        new_rows = centred.new_zeros(size_rows).index_add_(0, entries.rows, centred - new_columns[entries.columns]) / row_weight
        moved = max(float((new_rows - rows).abs().max()), float((new_columns - columns).abs().max()))
        rows, columns = new_rows, new_columns
        if moved <= limit:
            break
    return Biases(mean, rows, columns)
