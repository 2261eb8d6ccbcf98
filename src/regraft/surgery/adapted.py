"""The wrapper that injection puts around an adapted module, and that merging removes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from regraft.adapters.contract import Delta
from regraft.adapters.linear_like import is_table, oriented, shape_of, weight_of
from regraft.errors import InputError
from regraft.models.view import modules_of


@final
class Adapted(nn.Module):
    """A linear map, a Conv1D or an embedding with any number of adapters, each with its own weight in the sum.

    Args:
        base: The adapted module, whose own parameters are not changed.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict()
        self.shares: dict[str, float] = {}

    @property
    def weight(self) -> nn.Parameter:
        """Weight of the adapted module, which models read for its dtype and for tied heads."""
        return cast(nn.Parameter, self.base.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """Bias of the adapted module, or None."""
        return cast("nn.Parameter | None", getattr(self.base, "bias", None))

    @property
    def in_features(self) -> int:
        """Number of input features of the linear map."""
        return shape_of(self.base)[1]

    @property
    def out_features(self) -> int:
        """Number of output features of the linear map."""
        return shape_of(self.base)[0]

    def add(self, name: str, delta: Delta) -> None:
        """Adds an adapter and switches it on."""
        self.deltas[name] = delta
        self.shares[name] = 1.0

    def drop(self, name: str) -> None:
        """Removes an adapter, if there is one of this name."""
        if name in self.deltas:
            del self.deltas[name]
        self.shares.pop(name, None)

    def active(self) -> Iterator[tuple[Delta, float]]:
        """Yields the adapters that are on, with their weights in the sum."""
        for name, share in self.shares.items():
            if share != 0.0:
                yield cast(Delta, self.deltas[name]), share

    def forward(self, x: Tensor) -> Tensor:
        """Returns the module's output plus the weighted sum of the adapters' outputs, in the output's dtype.

        Args:
            x: ``(..., in)``, or token ids for an embedding.
        """
        result = self.base(x)
        table = is_table(self.base)
        for delta, share in self.active():
            change = delta.lookup(x) if table else delta(self._input(x, delta))
            change = change if share == 1.0 else share * change
            result = result + self._as_looked_up(change).to(result.dtype)
        return result

    def _as_looked_up(self, change: Tensor) -> Tensor:
        """Returns an adapter's output on the scale of the module's: Gemma's embedding multiplies its output by a constant."""
        scale = getattr(self.base, "embed_scale", None) if is_table(self.base) else None
        return change if scale is None else change * scale

    def _input(self, x: Tensor, delta: Delta) -> Tensor:
        """Returns the input of an adapter: with dropout, and in float32 like its parameters unless autocast is on."""
        wide = x if torch.is_autocast_enabled(x.device.type) else x.float()
        return dropout(wide, delta.spec.dropout) if self.training and delta.spec.dropout else wide

    def change(self) -> Tensor:
        """Returns the weighted sum of the weight changes of all adapters that are on, ``(out, in)`` float32."""
        total = torch.zeros(shape_of(self.base), dtype=torch.float32, device=weight_of(self.base).device)
        for delta, share in self.active():
            total += share * delta.delta_weight()
        return total

    def merged(self) -> nn.Module:
        """Adds the weight changes to the weight, computing in float32, and returns the plain module.

        Raises:
            InputError: The weight has no floating dtype.
        """
        weight = weight_of(self.base)
        if not weight.is_floating_point():
            raise InputError(f"a weight of type {weight.dtype} takes no change; keep the adapter beside it with `merge=False`")
        with torch.no_grad():
            weight.copy_((weight.float() + oriented(self.base, self.change())).to(weight.dtype))
        return self.base


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """Returns every adapted module by its full name in the plain model."""
    return modules_of(model, Adapted)


def wrap(model: nn.Module, name: str) -> Adapted:
    """Returns the wrapper of a module, and makes one if there is none yet."""
    module = model.get_submodule(name)
    if isinstance(module, Adapted):
        return module
    adapted = Adapted(module)
    adapted.train(module.training)
    _put(model, name, adapted)
    return adapted


def unwrap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a wrapper by the plain module."""
    _put(model, name, module)


def activate(model: nn.Module, shares: Mapping[str, float]) -> None:
    """Switches the named adapters on with the given weights, and all others off.

    Args:
        model: A model with one or several adapters.
        shares: Name of an adapter to its weight in the sum.

    Raises:
        InputError: The model has no adapter of such a name.
    """
    modules = adapted_modules(model)
    known = sorted({name for module in modules.values() for name in module.deltas})
    for name in shares:
        if name not in known:
            raise InputError(f"the model has no adapter '{name}'; it has: {', '.join(known) or 'none'}")
    for module in modules.values():
        module.shares = {name: float(shares.get(name, 0.0)) for name in module.deltas}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
