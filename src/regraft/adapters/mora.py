"""MoRA: one square matrix with as many parameters as LoRA's two factors, between a fixed compression of inputs and expansion of outputs.

    dW x = expand(M compress(x)),   M (s, s) from zero, s = floor(sqrt((out + in) r))

sharing    (type 1)  compress sums the inputs i = j mod s; expand repeats the s outputs. dW has at most rank s.
rotation   (type 6)  chunks of s inputs are rotated by angles that grow with the chunk number, as in RoPE, and each passes through M.
                     dW can have full rank.

We depart from the released code in rotation. With more input than output chunks, that code drops the surplus, so that most inputs of a
down projection have no influence; here the rotated chunks n, n + k, n + 2 k, ... are summed into output chunk n of k. An incomplete last
chunk is padded with zeros, not with the first inputs again.

References:
    [JIA24] Jiang, Huang, Luo, et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, one_hot, pad

from regraft.adapters.contract import ADAPTERS, Defaults, Delta, LowRank, Method, Spec
from regraft.errors import InputError
from regraft.settings import Settings

ROPE_BASE = 10000.0


class MoraOptions(Settings):
    """Settings of MoRA."""

    form: Literal["sharing", "rotation"] = Field(default="rotation", description="how inputs are shortened and outputs lengthened")


def side(spec: Spec) -> int:
    """Returns s, the side of M; it is even for rotation, which rotates pairs."""
    size = math.isqrt((spec.rows + spec.columns) * spec.rank)
    return size - size % 2 if spec.options.form == "rotation" else size


@final
class SharingDelta(Delta):
    """The weight change of MoRA's sharing form (type 1).

    Args:
        spec: Specification of the map and the adapter.
        matrix: M, ``(s, s)``.
    """

    def __init__(self, spec: Spec, matrix: Tensor) -> None:
        super().__init__(spec)
        self.matrix = nn.Parameter(matrix.float())

    def _outputs(self) -> Tensor:
        """Returns the row of M for every output, int64 ``(out,)``."""
        return torch.arange(self.spec.rows, device=self.matrix.device) % len(self.matrix)

    def delta(self, x: Tensor) -> Tensor:
        """Returns M times the summed inputs, repeated to all outputs."""
        size = len(self.matrix)
        short = pad(x, (0, -self.spec.columns % size)).unflatten(-1, (-1, size)).sum(dim=-2)
        return linear(short, self.matrix)[..., self._outputs()]

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the columns of M for the ids, repeated to all outputs."""
        return embedding(ids % len(self.matrix), self.matrix.T)[..., self._outputs()]

    def delta_weight(self) -> Tensor:
        """Returns the weight change: M repeated along both sides."""
        inputs = torch.arange(self.spec.columns, device=self.matrix.device) % len(self.matrix)
        return self.matrix[self._outputs()][:, inputs]

    def low_rank(self) -> LowRank:
        """Returns the factors: the repeated rows of M, and the matrix of zeros and ones that sums inputs."""
        inputs = torch.arange(self.spec.columns, device=self.matrix.device) % len(self.matrix)
        return LowRank(self.matrix.detach()[self._outputs()], one_hot(inputs, len(self.matrix)).T.float())


@final
class RotationDelta(Delta):
    """The weight change of MoRA's rotation form (type 6), with the departures described above.

    Args:
        spec: Specification of the map and the adapter.
        matrix: M, ``(s, s)``.
    """

    def __init__(self, spec: Spec, matrix: Tensor) -> None:
        super().__init__(spec)
        self.matrix = nn.Parameter(matrix.float())
        size = len(matrix)
        self.chunks_in, self.chunks_out = math.ceil(spec.columns / size), math.ceil(spec.rows / size)
        frequencies = ROPE_BASE ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(torch.arange(self.chunks_in, dtype=torch.float64), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float().to(matrix.device), persistent=False)
        self.register_buffer("sin", angles.sin().float().to(matrix.device), persistent=False)

    def _turned(self, chunks: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns chunks ``(..., s)`` rotated by angles of the same shape, pairs (p, p + s/2)."""
        first, second = chunks.chunk(2, dim=-1)
        return chunks * cos + torch.cat([-second, first], dim=-1) * sin

    def delta(self, x: Tensor) -> Tensor:
        """Returns M times the rotated chunks, which are summed into at most as many chunks as there are output chunks."""
        size = len(self.matrix)
        chunks = pad(x, (0, -self.spec.columns % size)).unflatten(-1, (-1, size))
        turned = self._turned(chunks, cast(Tensor, self.cos), cast(Tensor, self.sin))
        surplus = -self.chunks_in % self.chunks_out
        if self.chunks_in > self.chunks_out:
            turned = pad(turned, (0, 0, 0, surplus)).unflatten(-2, (-1, self.chunks_out)).sum(dim=-3)
        return self._written(linear(turned, self.matrix))

    def _written(self, chunks: Tensor) -> Tensor:
        """Returns outputs ``(..., out)`` from chunks ``(..., n, s)``, which are repeated if they are too few."""
        repeats = math.ceil(self.chunks_out / chunks.shape[-2])
        repeated = torch.cat([chunks] * repeats, dim=-2) if repeats > 1 else chunks
        return repeated.flatten(-2)[..., : self.spec.rows]

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the change for one-hot inputs: a rotated column of M, at the position of its chunk."""
        size = len(self.matrix)
        chunk, place = ids // size, ids % size
        unit = one_hot(place, size).to(self.matrix.dtype)
        column = linear(self._turned(unit, cast(Tensor, self.cos)[chunk], cast(Tensor, self.sin)[chunk]), self.matrix)
        written = min(self.chunks_in, self.chunks_out)
        where = one_hot(chunk % self.chunks_out, written).to(column.dtype)
        return self._written(where.unsqueeze(-1) * column.unsqueeze(-2))

    def delta_weight(self) -> Tensor:
        """Returns the weight change, computed from the identity as input."""
        return self.delta(torch.eye(self.spec.columns, device=self.matrix.device)).T

    def low_rank(self) -> LowRank:
        """Raises an error, because the change has full rank."""
        raise InputError(
            f"mora's rotation has full rank in '{self.spec.name}' and is no plain LoRA; fold it into the weights instead, with "
            "`regraft export ADAPTER --to merged`, or train with `adapter_options=form=sharing`"
        )


@final
class Mora(Method):
    """The method MoRA."""

    name = "mora"
    options = MoraOptions
    defaults = Defaults(lr=3e-4, alpha_per_rank=None, dropout=0.05)

    def check(self, spec: Spec) -> None:
        """Refuses a matrix M that is larger than the weight, or smaller than 2 x 2."""
        size, limit = side(spec), min(spec.shape)
        if size > limit:
            most = limit**2 // (spec.rows + spec.columns)
            raise InputError(
                f"rank {spec.rank} gives '{spec.name}' a matrix of side {size}, above the limit {limit} ({spec.rows} x {spec.columns}); "
                + (f"use `rank={most}` or less" if most else "leave it out with `targets`")
            )
        if size < 2:
            raise InputError(f"rank {spec.rank} gives '{spec.name}' a matrix of side {size}, below 2; use a higher `rank`")

    def count(self, spec: Spec) -> int:
        """Returns s^2, at most (out + in) r."""
        return side(spec) ** 2

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change of zero."""
        return self._of(spec, torch.zeros(side(spec), side(spec), device=given.device))

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from the stored M."""
        return self._of(spec, tensors["matrix"])

    def _of(self, spec: Spec, matrix: Tensor) -> Delta:
        return RotationDelta(spec, matrix) if spec.options.form == "rotation" else SharingDelta(spec, matrix)


ADAPTERS.add(Mora.name, Mora())
