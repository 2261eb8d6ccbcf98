"""Diagonals around the leading columns of a weight: the post-training of Bolaco, for the second factor of a factored layer.

    dW = [diag(1 + d) W_r diag(1 + b) - W_r, 0],   d (out,), b (r,), both zero at first

W_r are the first r columns of W. In a layer ``B A`` made by ``regraft compress`` these are the components that matter most, and W is B, the
module ``expand``: the change folds exactly into B, whose shape stays. On a dense layer it scales outputs and some inputs.

References:
    [JI24] Ji, Xiang, Li, et al., "Feature-based Low-Rank Compression of Large Language Models via Bayesian Optimization",
        arXiv 2405.10616, section 3.3 (there L_d and L_b, started at the identity, as here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regraft.adapters.contract import ADAPTERS, Defaults, Delta, LowRank, Method, Spec
from regraft.settings import Settings


class DiagonalOptions(Settings):
    """Options of the diagonals: none."""


@final
class DiagonalDelta(Delta):
    """The weight change ``diag(1 + d) W_r diag(1 + b) - W_r`` in the first r columns.

    Args:
        spec: Specification of the map and the adapter.
        leading: W_r, ``(out, r)``.
        outputs: d, ``(out,)``.
        components: b, ``(r,)``.
    """

    def __init__(self, spec: Spec, leading: Tensor, outputs: Tensor, components: Tensor) -> None:
        super().__init__(spec)
        self.register_buffer("leading", leading.float().contiguous())
        self.outputs = nn.Parameter(outputs.float())
        self.components = nn.Parameter(components.float())

    def _columns(self) -> Tensor:
        """Returns the change of the first r columns, ``(out, r)``; d + b + d b is exact where both are small."""
        d, b = self.outputs.unsqueeze(1), self.components
        return cast(Tensor, self.leading) * (d + b + d * b)

    def delta(self, x: Tensor) -> Tensor:
        """Returns the change of the output from the first r inputs."""
        return linear(x[..., : self.spec.rank], self._columns())

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the changed columns at the ids, zero for ids from r on."""
        table = torch.nn.functional.pad(self._columns(), (0, self.spec.columns - self.spec.rank)).T
        return torch.nn.functional.embedding(ids, table)

    def delta_weight(self) -> Tensor:
        """Returns the weight change, zero in the other columns."""
        return torch.nn.functional.pad(self._columns(), (0, self.spec.columns - self.spec.rank))

    def low_rank(self) -> LowRank:
        """Returns the changed columns and the rows of the identity that pick their inputs."""
        columns = self._columns().detach()
        return LowRank(columns, torch.eye(self.spec.rank, self.spec.columns, device=columns.device))


@final
class Diagonal(Method):
    """The diagonals of Bolaco's post-training."""

    name = "diagonal"
    options = DiagonalOptions
    defaults = Defaults(lr=4e-3, alpha_per_rank=None, dropout=0.0)

    def check(self, spec: Spec) -> None:
        """Accepts every rank up to the smaller side."""

    def count(self, spec: Spec) -> int:
        """Returns out + r."""
        return spec.rows + spec.rank

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change that is zero."""
        zeros = (given.new_zeros(size, dtype=torch.float32) for size in (spec.rows, spec.rank))
        return DiagonalDelta(spec, given[:, : spec.rank], *zeros)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from both diagonals and the columns of the weight."""
        own = (tensors[name].to(weight.device) for name in ("outputs", "components"))
        return DiagonalDelta(spec, weight[:, : spec.rank], *own)


ADAPTERS.add(Diagonal.name, Diagonal())
