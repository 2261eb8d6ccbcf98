"""Second moments of activations, accumulated in float64 in memory of O(width^2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# From this width on a product in float64 takes a noticeable part of a pass over the model.
_WIDE = 512
_ROWS = 1024
_BLOCKS = 4  # five eighths of the products are computed


@dataclass
class Moments:
    """Sums of activations and of their outer products over rows.

    Attributes:
        count: Number of rows added.
        total_D: Sum of the rows, float64.
        square_DD: Sum of the outer products of the rows, float64.
    """

    count: int
    total_D: Tensor
    square_DD: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Returns the moments of no rows."""
        return cls(
            0,
            torch.zeros(width, dtype=torch.float64, device=device),
            torch.zeros(width, width, dtype=torch.float64, device=device),
        )

    def add(self, rows: Tensor) -> None:
        """Adds rows, (..., width), of any float dtype.

        Products of wide rows are taken in float32, some hundreds of rows at a time, and added up in float64. This takes half of the time,
        and its error is that of single roundings.
        """
        rows_ND = rows.reshape(-1, rows.shape[-1])
        self.count += rows_ND.shape[0]
        self.total_D += rows_ND.sum(dim=0, dtype=torch.float64)
        if rows_ND.shape[1] < _WIDE or rows_ND.dtype == torch.float64:
            self.square_DD.addmm_(rows_ND.double().T, rows_ND.double())
            return
        for first in range(0, rows_ND.shape[0], _ROWS):
            self._add_products(rows_ND[first : first + _ROWS].float())

    def _add_products(self, part_ND: Tensor) -> None:
        """Adds outer products of rows; blocks below the diagonal are those above it, turned over."""
        width = part_ND.shape[1]
        size = -(-width // _BLOCKS)
        for first in range(0, width, size):
            end = min(first + size, width)
            block = part_ND[:, first:end].T @ part_ND[:, first:]
            self.square_DD[first:end, first:] += block
            self.square_DD[end:, first:end] += block[:, end - first :].T

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total_D + other.total_D, self.square_DD + other.square_DD)

    def without(self, part: Moments) -> Moments:
        """Returns the moments of all rows except those of ``part``; if ``part`` has all rows, the moments of all."""
        if part.count >= self.count:
            return self
        return Moments(self.count - part.count, self.total_D - part.total_D, self.square_DD - part.square_DD)

    @property
    def mean_D(self) -> Tensor:
        """Mean of the rows."""
        return self.total_D / max(1, self.count)

    @property
    def second_DD(self) -> Tensor:
        """Mean of the outer products (second moments, not centred)."""
        return self.square_DD / max(1, self.count)

    @property
    def variance_D(self) -> Tensor:
        """Unbiased variance of each channel; zero for fewer than two rows."""
        if self.count < 2:
            return torch.zeros_like(self.total_D)
        centred = self.square_DD.diagonal() - self.count * self.mean_D.square()
        return centred.clamp_min(0.0) / (self.count - 1)


def adder(found: dict[str, Moments]) -> Callable[[str, Tensor], None]:
    """Returns a function that adds rows to the moments of a name, which begin with its first rows."""

    def add(name: str, rows: Tensor) -> None:
        if name not in found:
            found[name] = Moments.empty(rows.shape[-1], rows.device)
        found[name].add(rows)

    return add


@dataclass
class ChannelMoments:
    """Sums of activations and of their squares for each channel: the diagonal of :class:`Moments`.

    Attributes:
        count: Number of rows added.
        total_D: Sum of the rows, float64.
        square_D: Sum of the squares, float64.
    """

    count: int
    total_D: Tensor
    square_D: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> ChannelMoments:
        """Returns the moments of no rows."""
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.clone())

    def add(self, rows: Tensor) -> None:
        """Adds rows of shape (..., width) and any float dtype."""
        rows_ND = rows.reshape(-1, rows.shape[-1]).double()
        self.count += rows_ND.shape[0]
        self.total_D += rows_ND.sum(dim=0)
        self.square_D += rows_ND.square().sum(dim=0)

    @property
    def power_D(self) -> Tensor:
        """Mean square of each channel."""
        return self.square_D / max(1, self.count)

    @property
    def variance_D(self) -> Tensor:
        """Unbiased variance of each channel; zero for fewer than two rows."""
        if self.count < 2:
            return torch.zeros_like(self.total_D)
        return (self.square_D - self.total_D.square() / self.count).clamp_min(0.0) / (self.count - 1)
