"""Observed entries of a matrix (all of them, a dense mask, or a list), and products of the residual with thin factors.

A descent never needs the residual E = P(f - M) of a factorization f = left @ first itself, only ``E @ first.T`` and ``left.T @ E``.
For a list of entries both cost O(entries x w) time and O(entries) memory: nothing of size m x n is made.

References:
    [YAR24] Yaras, Wang, Balzano, Qu, arXiv 2406.04112, section 3 (deep matrix completion).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from regraft.errors import DataError, InputError
from regraft.numerics import linalg
from regraft.numerics.svd import Triplets, sketched_triplets

GATHERED_NUMBERS = 160_000
"""Numbers gathered at once when entries are evaluated: 1.3 MB in float64, which stays in a core's cache.

On one core, 800,000 entries of width 10: 20 ms in chunks of this size, 106 ms in one piece.
"""


class Pull(NamedTuple):
    """The squared error of a factorization ``left @ first`` and the gradients of half of it."""

    squared_error: float
    """Sum of the squared residuals over the observed entries."""
    d_left: Tensor
    """m x w, E first^T."""
    d_first: Tensor | None
    """w x n, left^T E."""


class Observed(ABC):
    """The observed entries of an m x n matrix M."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of observed entries."""

    @property
    @abstractmethod
    def squared_norm(self) -> float:
        """Sum of the squares of the observed entries."""

    @abstractmethod
    def pull(self, left: Tensor, first: Tensor, *, need_first: bool = True) -> Pull:
        """Returns the squared error of ``left @ first`` (m x w, w x n) and the gradients of half of it."""

    @abstractmethod
    def times(self, block: Tensor) -> Tensor:
        """Multiplies the observed matrix, with zeros for the other entries, by an n x k block."""

    @abstractmethod
    def transpose_times(self, block: Tensor) -> Tensor:
        """Multiplies the transpose of the observed matrix by an m x k block."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the tensors."""

    @property
    def share(self) -> float:
        """Share of the m n entries that is observed."""
        return self.count / (self.shape[0] * self.shape[1])

    def top_triplets(self, rank: int, generator: torch.Generator) -> Triplets:
        """Returns the leading triplets of the observed matrix, which is minus the end-to-end gradient at a start near zero."""
        return sketched_triplets(self.times, self.transpose_times, self.shape, rank, generator, iterations=16, device=self.device)


@final
class WholeMatrix(Observed):
    """All entries of M, or those under a dense mask; for matrices whose residual fits in memory.

    Args:
        target: m x n, float64.
        mask: m x n, of 0 and 1 or bool; None for all entries.

    Raises:
        InputError: The target is not finite, or the mask has another shape or is empty.
    """

    def __init__(self, target: Tensor, mask: Tensor | None = None) -> None:
        if mask is not None and mask.shape != target.shape:
            raise InputError(f"the mask is {tuple(mask.shape)}, the matrix {tuple(target.shape)}; give both the same shape")
        self.mask = None if mask is None else mask.to(target.dtype)
        self.target = target if self.mask is None else torch.where(self.mask > 0, target, 0.0)
        if not bool(torch.isfinite(self.target).all()):
            raise InputError("the observed matrix holds NaN or infinity; leave such entries out of the mask")
        self._count = target.numel() if self.mask is None else int(self.mask.count_nonzero())
        if self._count == 0:
            raise InputError("the mask observes no entry; give at least one")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.target.shape[0], self.target.shape[1]

    @property
    def count(self) -> int:
        """Number of observed entries."""
        return self._count

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of the observed entries."""
        return float(self.target.square().sum())

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.target.device

    def pull(self, left: Tensor, first: Tensor, *, need_first: bool = True) -> Pull:
        """Forms the m x n residual; see :meth:`Observed.pull`."""
        residual = torch.addmm(self.target, left, first, beta=-1.0)
        if self.mask is not None:
            residual *= self.mask
        squared = float(torch.dot(residual.view(-1), residual.view(-1)))
        return Pull(squared, residual @ first.T, left.T @ residual if need_first else None)

    def times(self, block: Tensor) -> Tensor:
        """See :meth:`Observed.times`."""
        return self.target @ block

    def transpose_times(self, block: Tensor) -> Tensor:
        """See :meth:`Observed.transpose_times`."""
        return self.target.T @ block


@final
class EntryList(Observed):
    """Observed entries as lists of rows, columns and values; the residual is never dense.

    Args:
        rows: Row index of each entry, from 0.
        columns: Column index of each entry, from 0.
        values: Value of each entry, finite.
        shape: (m, n).

    Attributes:
        rows: Row indices, sorted by row, then by column.
        columns: Column indices in the same order.
        values: Values in the same order, float64.
        order: The permutation from the caller's order to the sorted one.

    Raises:
        DataError: The lists are empty or of different lengths, an index is out of range, a value is not finite, or an entry is
            given twice.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        _check_entries(rows, columns, values, shape)
        key = rows.long() * shape[1] + columns.long()
        key, self.order = key.sort()
        self.rows = rows.long()[self.order]
        self.columns = columns.long()[self.order]
        _refuse_duplicates(key, self.rows, self.columns)
        self.values = values.to(torch.float64)[self.order]
        self._shape = shape
        self._column_order = torch.argsort(self.columns, stable=True)
        self._by_row = _compressed(self.rows, self.columns, self.values, shape)
        self._by_column = _compressed(
            self.columns[self._column_order],
            self.rows[self._column_order],
            self.values[self._column_order],
            (shape[1], shape[0]),
        )
        self._squared_norm = float(self.values.square().sum())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self._shape

    @property
    def count(self) -> int:
        """Number of observed entries."""
        return self.values.numel()

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of the observed entries."""
        return self._squared_norm

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.values.device

    def at(self, left: Tensor, right: Tensor) -> Tensor:
        """Returns the observed entries of ``left @ right.T`` (m x w, n x w), in the list's order."""
        return entries_of(left, right, self.rows, self.columns)

    def pull(self, left: Tensor, first: Tensor, *, need_first: bool = True) -> Pull:
        """Evaluates the residual at the observed entries only, in O(entries x w); see :meth:`Observed.pull`."""
        right = first.T
        residual = self.at(left, right) - self.values
        squared = float(torch.dot(residual, residual))
        d_left = self.spread(residual, right)
        return Pull(squared, d_left, self.transpose_spread(residual, left).T if need_first else None)

    def spread(self, entries: Tensor, block: Tensor) -> Tensor:
        """Multiplies the sparse matrix with these entries (in the list's order) by an n x k block."""
        self._by_row.values().copy_(entries)
        return self._by_row @ block

    def transpose_spread(self, entries: Tensor, block: Tensor) -> Tensor:
        """Multiplies the transpose of the sparse matrix with these entries by an m x k block."""
        self._by_column.values().copy_(entries[self._column_order])
        return self._by_column @ block

    def times(self, block: Tensor) -> Tensor:
        """See :meth:`Observed.times`."""
        return self.spread(self.values, block)

    def transpose_times(self, block: Tensor) -> Tensor:
        """See :meth:`Observed.transpose_times`."""
        return self.transpose_spread(self.values, block)

    def with_values(self, values: Tensor) -> EntryList:
        """Returns a list of the same positions with other values, given in the list's order."""
        return EntryList(self.rows, self.columns, values, self._shape)

    def to(self, device: torch.device | str) -> EntryList:
        """Returns the same entries on another device."""
        return EntryList(self.rows.to(device), self.columns.to(device), self.values.to(device), self._shape)


def entries_of(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the entries (rows[i], columns[i]) of ``left @ right.T``.

    Args:
        left: m x w.
        right: n x w.
        rows: e indices below m.
        columns: e indices below n.

    Returns:
        The e entries.
    """
    width = left.shape[1]
    step = max(1, GATHERED_NUMBERS // width)
    left, right = left.contiguous(), right.contiguous()
    ones = torch.ones(width, dtype=left.dtype, device=left.device)
    pieces = [
        left.index_select(0, rows[start : start + step]).mul_(right.index_select(0, columns[start : start + step])) @ ones
        for start in range(0, rows.numel(), step)
    ]
    return torch.cat(pieces) if pieces else left.new_zeros(0)


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Returns a CSR tensor of entries sorted by row; ``values`` is copied."""
    pointers = torch.zeros(shape[0] + 1, dtype=torch.int64, device=rows.device)
    pointers[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():  # torch announces once that CSR is in beta; its product is what we use, and we test it
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return linalg.csr(pointers, columns, values.clone(), shape)


def _check_entries(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
    sizes = (rows.numel(), columns.numel(), values.numel())
    if rows.dim() != 1 or columns.dim() != 1 or values.dim() != 1 or len(set(sizes)) != 1:
        raise DataError(f"rows, columns and values have {sizes[0]}, {sizes[1]} and {sizes[2]} entries; give three flat lists of one length")
    if sizes[0] == 0:
        raise DataError("there are no observed entries; give at least one")
    for indices, name, size in ((rows, "row", shape[0]), (columns, "column", shape[1])):
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= size:
            worst = low if low < 0 else high
            raise DataError(f"{name} {worst} is out of range: the shape {shape[0]} x {shape[1]} has {name}s 0 to {size - 1}; mend it")
    if not bool(torch.isfinite(values).all()):
        place = int((~torch.isfinite(values)).nonzero()[0])
        raise DataError(f"value {float(values[place])} of entry {place} is not finite; remove the entry")


def _refuse_duplicates(key: Tensor, rows: Tensor, columns: Tensor) -> None:
    repeated = (key[1:] == key[:-1]).nonzero()
    if repeated.numel():
        place = int(repeated[0])
        raise DataError(
            f"entry (row {int(rows[place])}, column {int(columns[place])}) is given more than once "
            f"({repeated.numel()} repetitions in all); keep one value for each entry"
        )
