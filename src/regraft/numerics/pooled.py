"""Moments of the inputs of a linear layer, of the kinds that low-rank methods ask for, accumulated in float64 in memory of O(width^2).

Bolaco (arXiv 2405.10616, section 3.1) averages the covariances within 32 groups of calibration text, so that what differs between texts
does not count as variance. For groups of equal size that is the pooled covariance

    (sum of x x' - sum over groups of t_g t_g' / n_g) / (N - groups),     t_g the sum of the rows of a group, n_g their number

which needs, beside the total of the outer products, no more than one sum of rows for each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PooledMoments:
    """Sums over the rows that were seen, which came in groups.

    Attributes:
        counts_G: Rows seen of each group, float64 (groups,).
        totals_GD: Sum of the rows of each group, float64 (groups, width).
        absolute_D: Sum of the absolute values, float64 (width,).
        square_DD: Sum of the outer products of the rows, float64 (width, width).
    """

    counts_G: Tensor
    totals_GD: Tensor
    absolute_D: Tensor
    square_DD: Tensor

    @classmethod
    def empty(cls, width: int, groups: int = 1, device: torch.device | str = "cpu") -> PooledMoments:
        """Returns moments that have seen nothing."""
        shapes = ((groups,), (groups, width), (width,), (width, width))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor, group: int = 0) -> None:
        """Adds rows, (..., width), of any float dtype, to one of the groups."""
        rows_ND = rows.reshape(-1, rows.shape[-1]).double()
        self.counts_G[group] += rows_ND.shape[0]
        self.totals_GD[group] += rows_ND.sum(dim=0)
        self.absolute_D += rows_ND.abs().sum(dim=0)
        self.square_DD.addmm_(rows_ND.T, rows_ND)

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.counts_G.sum())

    @property
    def mean_D(self) -> Tensor:
        """Mean of the rows."""
        return self.totals_GD.sum(dim=0) / max(1, self.count)

    @property
    def magnitude_D(self) -> Tensor:
        """Mean absolute value of each channel."""
        return self.absolute_D / max(1, self.count)

    @property
    def second_DD(self) -> Tensor:
        """Mean of the outer products, not centred."""
        return self.square_DD / max(1, self.count)

    @property
    def covariance_DD(self) -> Tensor:
        """Unbiased covariance within the groups, pooled; zero where no group has two rows."""
        scale, sums_GD = self.pooling()
        return scale * (self.square_DD - sums_GD.T @ sums_GD)

    def pooling(self) -> tuple[float, Tensor]:
        """Returns a factor and sums of rows, (groups, width), with ``covariance = factor (square - sums' sums)``."""
        seen = self.counts_G > 0
        freedom = self.count - int(seen.sum())
        return 1.0 / freedom if freedom > 0 else 0.0, self.totals_GD[seen] / self.counts_G[seen].sqrt().unsqueeze(1)
