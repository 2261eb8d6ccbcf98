"""Renumbering of a matrix without its empty rows and columns, and the way back to the old numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from regraft.completion.entries import EntryList
from regraft.numerics import linalg


class Compact(NamedTuple):
    """Entries renumbered so that every row and column has one."""

    entries: EntryList
    """The entries, with row and column indices in the new numbers."""
    rows: Tensor
    """Old number of each new row, ascending."""
    columns: Tensor
    """Old number of each new column, ascending."""


def compacted(entries: EntryList) -> Compact:
    """Renumbers the entries without the empty rows and columns."""
    kept_rows, rows = linalg.unique(entries.rows)
    kept_columns, columns = linalg.unique(entries.columns)
    shape = (kept_rows.numel(), kept_columns.numel())
    return Compact(EntryList(rows, columns, entries.values, shape), kept_rows, kept_columns)


def spread(compact: Tensor, places: Tensor, size: int) -> Tensor:
    """Returns a tensor of ``size`` rows on the CPU: each given row at its old number, zeros elsewhere."""
    whole = torch.zeros(size, *compact.shape[1:], dtype=compact.dtype)
    whole[places.cpu()] = compact.cpu()
    return whole


def absent(places: Tensor, size: int) -> Tensor:
    """Returns the numbers below ``size`` that are not among the places, ascending."""
    missing = torch.ones(size, dtype=torch.bool)
    missing[places.cpu()] = False
    return missing.nonzero().squeeze(1)
