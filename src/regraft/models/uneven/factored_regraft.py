"""Linear layers stored as two thin matrices.

This file is copied into the folder of every model with such layers, so that it needs only torch. Their names and ranks are in the config
under ``factored``, by the name of the layer within the base model::

    "factored": {"layers.0.self_attn.q_proj": {"rank": 64, "bias": true}}, "factor_layout": "plain"

Both matrices are plain ``nn.Linear`` modules, so that an adapter can be attached to either and merged into it exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PLAIN, PIFA = "plain", "pifa"


class FactoredLinear(nn.Module):
    """A linear layer ``y = B (A x) + b``, or by pivot rows ``y = [W_p x; K (W_p x)]``, reordered to the outputs, plus b.

    Args:
        in_features: Width of the inputs.
        out_features: Width of the outputs.
        rank: Width between the two matrices, smaller than both.
        bias: Whether the layer has a bias.
        layout: ``plain``, rank (in + out) numbers, or ``pifa``, rank (in + out - rank) and the order of the outputs.
    """

    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False, layout: str = PLAIN) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.layout = in_features, out_features, rank, layout
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features - rank if layout == PIFA else out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if layout == PIFA:
            self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))
        # An empty tensor under the name of the dense weight, so that a class that expects the weight refuses the file.
        self.register_buffer("weight", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out) for inputs (..., in)."""
        inner = self.reduce(x)
        y = self.expand(inner)
        if self.layout == PIFA:
            y = torch.cat([inner, y], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """Returns the product of the two matrices, (out, in), computed in float64."""
        pivots, expand = self.reduce.weight.double(), self.expand.weight.double()
        product = expand @ pivots
        if self.layout == PIFA:
            product = torch.cat([pivots, product]).index_select(0, self.order)
        return product.to(self.reduce.weight.dtype)

    def extra_repr(self) -> str:
        """Returns the sizes for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, layout={self.layout}"


def fit_factors(base: nn.Module, factored: Mapping[str, Mapping[str, Any]], layout: str) -> None:
    """Replaces linear layers by factored ones, whose values are loaded or initialised later.

    Args:
        base: The base model.
        factored: Name of each layer within the base model to its rank and whether it has a bias.
        layout: Layout of all factored layers.
    """
    for name, entry in factored.items():
        parent, _, last = name.rpartition(".")
        dense: Any = base.get_submodule(name)
        outputs, inputs = dense.weight.shape if isinstance(dense, nn.Linear) else dense.weight.shape[::-1]
        new = FactoredLinear(inputs, outputs, entry["rank"], bias=entry["bias"], layout=layout)
        setattr(base.get_submodule(parent), last, new.to(device=dense.weight.device, dtype=dense.weight.dtype))
