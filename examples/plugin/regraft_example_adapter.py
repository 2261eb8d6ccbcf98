"""An adapter for regraft, as an example of a plug-in: LoRA with one of its two factors frozen.

    dW = alpha/r B A,   B (out, r) from zero and trained, A (r, in) random and frozen

References:
    Zhang, Zhang, Shi, Chu, Li, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from regraft.adapters import Defaults, Delta, LowRank, Method, Spec
from regraft.settings import Settings


@final
class HalfFrozen(Delta):
    """The change of one weight.

    Args:
        spec: Shape of the weight, rank, alpha and seed.
        left: B, ``(out, r)``.
        right: A, ``(r, in)``.
    """

    def __init__(self, spec: Spec, left: Tensor, right: Tensor) -> None:
        super().__init__(spec)
        self.left = nn.Parameter(left.float())
        self.register_buffer("right", right.float())

    def delta(self, x: Tensor) -> Tensor:
        """Returns the change of the output for inputs ``(..., in)``."""
        return self.spec.scale * linear(linear(x, cast(Tensor, self.right)), self.left)

    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the change of the output where the inputs are ids, as in an embedding."""
        return self.spec.scale * linear(embedding(ids, cast(Tensor, self.right).T), self.left)

    def delta_weight(self) -> Tensor:
        """Returns the change of the weight, ``(out, in)``."""
        return self.spec.scale * self.left @ cast(Tensor, self.right)

    def low_rank(self) -> LowRank:
        """Returns the change as a plain LoRA, which is what makes it exportable."""
        return LowRank(self.spec.scale * self.left.detach(), cast(Tensor, self.right))

    def stored(self) -> dict[str, Tensor]:
        """Returns the tensors of the adapter's file: the frozen factor too, so that the file needs no seed."""
        return {"left": self.left.detach(), "right": cast(Tensor, self.right)}


@final
class LoraFa(Method):
    """The method: how a change is made, counted and read back."""

    name = "lora_fa"
    options = Settings  # none of its own
    defaults = Defaults(lr=2e-3)

    def check(self, spec: Spec) -> None:
        """Accepts every rank up to the smaller side."""

    def count(self, spec: Spec) -> int:
        """Returns the number of trained parameters."""
        return spec.rows * spec.rank

    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Returns a change of zero, whose frozen factor follows from the seed."""
        right = torch.randn(spec.rank, spec.columns, generator=spec.generator()) / spec.columns**0.5
        return HalfFrozen(spec, torch.zeros(spec.rows, spec.rank), right).to(given.device)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Returns the change that :meth:`HalfFrozen.stored` gave."""
        return HalfFrozen(spec, tensors["left"], tensors["right"]).to(weight.device)


LORA_FA = LoraFa()
