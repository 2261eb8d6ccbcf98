"""A linear bridge over removed layers: the layer below a gap takes over what can be had of the layers in it, by its own weights.

With h the inputs of the down projection in the layer below the gap, Y the stream beside it, and L the dense model's stream above the gap,
the projection's new weights are the ridge regression

    min over W'   E |Y + c (W' h + b) - L|^2 + lambda |W' - W|^2

c being what the layer multiplies the projection's output by. ReplaceMe (arXiv 2505.02819) fits a square matrix T and folds it in,
``W' = T W``. All of W' is fitted here, which contains that, costs no parameter either and keeps the stock class; the pull is towards the
old weights, so that a strong one is no bridge at all. The first token of each window is left out: its stream is often larger by orders
of magnitude (massive activations, arXiv 2402.17762) and would rule the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.models.layerwise import Layerwise, watched_inputs
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.numerics import linalg

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_NOT_LINEAR = 1e-3  # relative error of a layer's answer to a change of its down projection that counts as more than rounding


@dataclass(frozen=True)
class Gap:
    """Removed layers between two that stay, or above the last.

    Attributes:
        below: Index of the layer below, among those that stay.
        above: Index, among all layers of the dense model, of the last one that is gone.
    """

    below: int
    above: int


def gaps_between(layers: int, kept: Sequence[int]) -> tuple[Gap, ...]:
    """Returns the gaps of a model of which some layers stay; one below the first layer that stays has nothing to be bridged by.

    >>> gaps_between(8, [1, 2, 5, 6])
    (Gap(below=1, above=4), Gap(below=3, above=7))
    """
    ends = [*kept[1:], layers]
    return tuple(Gap(index, end - 1) for index, (layer, end) in enumerate(zip(kept, ends, strict=True)) if end > layer + 1)


def bridge(dense: ModelView, pruned: ModelView, kept: Sequence[int], windows_NT: Tensor) -> int:
    """Bridges every gap of a pruned model, from the lowest up, in place; nothing that it shares with the dense model is changed.

    Args:
        dense: The model before the cut.
        pruned: The model without the removed layers; its stream has the dense width.
        kept: The dense indices of its layers, ascending.
        windows_NT: Calibration tokens, int64 (windows, tokens); at least one in eight windows is held out to choose the ridge.

    Returns:
        The number of gaps that were bridged: those where the held-out error became smaller.

    Raises:
        InputError: The family changes the feed-forward output by more than a factor before it adds it, so that no weights can bridge.
    """
    gaps = {gap.below: gap for gap in gaps_between(len(dense.layers), kept)}
    readers = {group.layer: group for group in discover(pruned, ("ffn",)).of("ffn")}
    stored = pruned.model.dtype
    changed: list[nn.Module] = []
    with float32_on_cpu(dense.model), float32_on_cpu(pruned.model):
        goals = _streams_above(dense, windows_NT, {gap.above for gap in gaps.values()})
        walk = Layerwise(pruned, windows_NT)
        hidden = walk.first
        for layer in range(len(pruned.layers)):
            gap, group = gaps.get(layer), readers.get(layer)
            if gap is not None and group is not None:
                projection = pruned.model.get_submodule(group.reader.parameter.rpartition(".")[0])
                new_OI = _fit(walk, layer, projection, group.reader.axis, hidden, goals[gap.above])
                if new_OI is not None:
                    _put(projection, new_OI if group.reader.axis == 1 else new_OI.T, stored)
                    changed.append(projection)
            hidden = walk.run(layer, hidden)
    for projection in changed:
        weight = projection.get_parameter("weight")
        weight.data = weight.data.to(stored)
    return len(changed)


def _put(projection: nn.Module, weight: Tensor, stored: torch.dtype) -> None:
    """Gives a projection a weight of its own, with the values that are saved, in the dtype of the present computation."""
    now = projection.get_parameter("weight")
    projection.register_parameter("weight", nn.Parameter(weight.to(stored).to(now.dtype), requires_grad=False))


@torch.no_grad()
def _streams_above(dense: ModelView, windows_NT: Tensor, wanted: set[int]) -> dict[int, list[Tensor]]:
    """Returns the outputs of some layers, a tensor (windows, tokens, hidden) for each batch."""
    walk = Layerwise(dense, windows_NT)
    hidden, found = walk.first, dict[int, list[Tensor]]()
    for layer in range(max(wanted, default=-1) + 1):
        hidden = walk.run(layer, hidden)
        if layer in wanted:
            found[layer] = hidden
    return found


@torch.no_grad()
def _fit(walk: Layerwise, layer: int, projection: nn.Module, axis: int, hidden: list[Tensor], goals: list[Tensor]) -> Tensor | None:
    """Returns the new weights of one layer's down projection, float64 (out, in); None where none are better on held-out windows."""
    weight = projection.get_parameter("weight")
    old_OI = (weight if axis == 1 else weight.T).double()
    factor = _factor(walk, layer, projection, hidden[0])
    parts = [_Sums.empty(old_OI), _Sums.empty(old_OI)]
    for batch, goal in zip(hidden, goals, strict=True):
        inputs: dict[str, Tensor] = {}
        with watched_inputs({"h": projection}, inputs.__setitem__):
            output = walk.call(layer, batch)
        judged = max(1, len(batch) // 8) if len(batch) > 1 else 0
        missing = (goal - output).double() / factor  # beside what the projection gives now
        for part, rows in zip(parts, (slice(0, len(batch) - judged), slice(len(batch) - judged, len(batch))), strict=True):
            part.add(inputs["h"].reshape(*batch.shape[:2], -1)[rows, 1:], missing[rows, 1:], old_OI)
    fitted, judge = parts
    if not judge.count:
        judge = fitted
    best = min(DAMPINGS, key=lambda damping: judge.error(fitted.solve(old_OI, damping)))
    new_OI = fitted.solve(old_OI, best)
    if not judge.error(new_OI) < judge.error(old_OI):
        return None
    return (fitted if judge is fitted else fitted + judge).solve(old_OI, best)


@dataclass
class _Sums:
    """Moments for a ridge regression from inputs h to the wanted outputs W h.

    Attributes:
        count: Number of rows.
        inputs_II: Sum of ``h h'``.
        cross_OI: Sum of ``z h'`` for the goal z of ``W h``.
        power: Sum of ``|z|^2``.
    """

    count: int
    inputs_II: Tensor
    cross_OI: Tensor
    power: float

    @classmethod
    def empty(cls, weight_OI: Tensor) -> _Sums:
        width = weight_OI.shape[1]
        return cls(0, weight_OI.new_zeros(width, width), torch.zeros_like(weight_OI), 0.0)

    def add(self, inputs: Tensor, missing: Tensor, weight_OI: Tensor) -> None:
        """Adds inputs h and what is missing beside the output of the present weights."""
        h_NI, z_NO = inputs.reshape(-1, inputs.shape[-1]).double(), missing.reshape(-1, missing.shape[-1])
        z_NO = z_NO + h_NI @ weight_OI.T
        self.count += len(h_NI)
        self.inputs_II += h_NI.T @ h_NI
        self.cross_OI += z_NO.T @ h_NI
        self.power += float(z_NO.square().sum())

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.count + other.count, self.inputs_II + other.inputs_II, self.cross_OI + other.cross_OI, self.power + other.power)

    def solve(self, old_OI: Tensor, damping: float) -> Tensor:
        """Returns the weights for a ridge towards the old ones, relative to the mean of the diagonal."""
        ridge = damping * float(self.inputs_II.diagonal().mean()) or 1.0
        damped = self.inputs_II.clone()
        damped.diagonal().add_(ridge)
        return torch.cholesky_solve((self.cross_OI + ridge * old_OI).T, linalg.cholesky(damped)).T

    def error(self, weight_OI: Tensor) -> float:
        """Returns the sum of ``|z - W h|^2``."""
        return self.power - 2.0 * float((weight_OI * self.cross_OI).sum()) + float(((weight_OI @ self.inputs_II) * weight_OI).sum())


def _factor(walk: Layerwise, layer: int, projection: nn.Module, hidden_BTD: Tensor) -> float:
    """Returns what a layer multiplies the output of a projection by before it adds it to the stream.

    Raises:
        InputError: It does something else with it.
    """
    before = walk.call(layer, hidden_BTD)
    change = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before) * before.std()

    def moved(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output + change.reshape(output.shape)

    handle = projection.register_forward_hook(cast(Any, moved))
    try:
        answer = walk.call(layer, hidden_BTD) - before
    finally:
        handle.remove()
    factor = float((answer * change).sum() / change.square().sum())
    if factor == 0.0 or float((answer - factor * change).norm() / (factor * change).norm()) > _NOT_LINEAR:
        raise InputError(
            "`bridge`: this family passes the feed-forward output through a norm before it adds it, so that no weights can bridge a gap; "
            "leave `bridge` out"
        )
    return factor
