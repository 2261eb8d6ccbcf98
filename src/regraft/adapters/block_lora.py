"""Block-diagonal LoRA: n LoRAs side by side, each from its own part of the inputs to its own part of the outputs.

    dW = alpha/r blkdiag(B_1 A_1, ..., B_n A_n),   A_i (r, in_i),  B_i (out_i, r),  B_i = 0 at first

All n together have the parameters of one LoRA of rank r, ``r (in + out)``, and a change of rank up to ``n r``. It is exactly a plain
LoRA of rank ``n r`` whose factors are zero outside their blocks, which is how it is exported.

The number of blocks follows [RALORA] from the first gradient G of the loss: ``n = 2^floor(log2(erank(G) / r))``, where the effective rank
``erank`` is the exponential of the entropy of the normalised singular values. We depart in one point: inputs and outputs are divided as
evenly as possible, so that n need not divide them, as the widths of pruned layers are rarely powers of two.

References:
    [RALORA] RaLoRA, ICLR 2026 (OpenReview kObvnQ6pUx): effective rank of the gradient, and blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from regraft.adapters.contract import ADAPTERS, Defaults, Delta, LowRank, Method, Spec
from regraft.errors import InputError
from regraft.settings import Settings


class BlockLoraOptions(Settings):
    """Options of block-diagonal LoRA."""

    blocks: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="number of blocks; auto: by the effective rank of the first gradient"
    )
    batches: Annotated[int, Field(ge=1)] = Field(default=1, description="training batches for the first gradient, with blocks auto")


def effective_rank(matrix: Tensor) -> float:
    """Returns the exponential of the entropy of the normalised singular values of a matrix; 0 for a matrix of zeros.

    >>> round(effective_rank(torch.eye(5)), 6), effective_rank(torch.zeros(3, 3))
    (5.0, 0.0)
    """
    values = torch.linalg.svdvals(matrix.double())
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def even_parts(length: int, parts: int) -> list[int]:
    """Returns the sizes of ``parts`` parts of a length, which differ by one at most.

    >>> even_parts(10, 4)
    [3, 3, 2, 2]
    """
    small, larger = divmod(length, parts)
    return [small + 1] * larger + [small] * (parts - larger)


@final
class BlockLoraDelta(Delta):
    """The weight change of block-diagonal LoRA.

    Args:
        spec: Specification of the map and the adapter.
        right: All A_i side by side, ``(r, in)``.
        left: All B_i one above the other, ``(out, r)``.
        blocks: Number of blocks.
    """

    def __init__(self, spec: Spec, right: Tensor, left: Tensor, blocks: int) -> None:
        super().__init__(spec)
        self.blocks = blocks
        self.right = nn.Parameter(right.float())
        self.left = nn.Parameter(left.float())
        self._inputs, self._outputs = even_parts(spec.columns, blocks), even_parts(spec.rows, blocks)

    def delta(self, x: Tensor) -> Tensor:
        """Returns the outputs of all blocks, one after another."""
        parts = zip(x.split(self._inputs, -1), self.right.split(self._inputs, 1), self.left.split(self._outputs, 0), strict=True)
        return self.spec.scale * torch.cat([linear(linear(part, right), left) for part, right, left in parts], dim=-1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the columns of the change for the ids."""
        factors = self._factors()
        return linear(embedding(ids, factors.right.T), factors.left)

    def delta_weight(self) -> Tensor:
        """Returns the weight change, zero outside the blocks."""
        parts = zip(self.right.split(self._inputs, 1), self.left.split(self._outputs, 0), strict=True)
        return self.spec.scale * torch.block_diag(*(left @ right for right, left in parts))

    def low_rank(self) -> LowRank:
        """Returns the factors of a plain LoRA of rank n r."""
        factors = self._factors()
        return LowRank(factors.left.detach(), factors.right.detach())

    def stored(self) -> dict[str, Tensor]:
        """Returns the factors and the number of blocks."""
        return {**super().stored(), "blocks": torch.tensor([self.blocks])}

    def _factors(self) -> LowRank:
        right = torch.block_diag(*self.right.split(self._inputs, 1))
        left = torch.block_diag(*self.left.split(self._outputs, 0))
        return LowRank(self.spec.scale * left, right)


@final
class BlockLora(Method):
    """The method block-diagonal LoRA."""

    name = "block_lora"
    options = BlockLoraOptions
    defaults = Defaults(lr=1e-3, alpha_per_rank=2.0, dropout=0.05)

    def check(self, spec: Spec) -> None:
        """Refuses more blocks of a rank than fit into the map."""
        blocks = cast(BlockLoraOptions, spec.options).blocks
        limit = min(spec.shape) // spec.rank
        if blocks != "auto" and blocks > limit:
            raise InputError(
                f"{blocks} blocks of rank {spec.rank} do not fit into '{spec.name}' ({spec.rows} x {spec.columns}); "
                f"give {limit} blocks or fewer, or a lower `rank`"
            )

    def count(self, spec: Spec) -> int:
        """Returns r (out + in), for every number of blocks."""
        return spec.rank * (spec.rows + spec.columns)

    def gradient_batches(self, options: Settings) -> int:
        """Returns the number of batches for the first gradient, if the number of blocks follows from it."""
        chosen = cast(BlockLoraOptions, options)
        return chosen.batches if chosen.blocks == "auto" else 0

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change of zero, with every A_i uniform in ``±1/sqrt(in_i)`` as LoRA's."""
        chosen = cast(BlockLoraOptions, spec.options).blocks
        blocks = blocks_for(given, spec.rank) if chosen == "auto" else chosen
        right = torch.empty(spec.rank, spec.columns).uniform_(-1.0, 1.0, generator=spec.generator())
        bounds = [1.0 / math.sqrt(size) for size in even_parts(spec.columns, blocks) for _ in range(size)]
        left = torch.zeros(spec.rows, spec.rank)
        return BlockLoraDelta(spec, (right * torch.tensor(bounds)).to(given.device), left.to(given.device), blocks)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from the stored factors.

        Raises:
            InputError: The number of blocks does not fit.
        """
        blocks = int(tensors["blocks"].sum())
        if not 1 <= blocks <= min(spec.shape):
            raise InputError(f"the adapter of '{spec.name}' has {blocks} blocks; at least 1 and at most {min(spec.shape)} fit")
        return BlockLoraDelta(spec, tensors["right"], tensors["left"], blocks)


def blocks_for(gradient_OI: Tensor, rank: int) -> int:
    """Returns the largest power of two of blocks whose ranks together do not exceed the effective rank of a gradient; 1 at least."""
    return 2 ** max(0, math.floor(math.log2(max(1.0, effective_rank(gradient_OI) / rank))))


ADAPTERS.add(BlockLora.name, BlockLora())
