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
from regraft.numerics.reconstruction import NormalEquations

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
                fit = _fit(walk, layer, projection, group.reader.axis, hidden, goals[gap.above])
                if fit.new_OI is not None:
                    _put(projection, fit.new_OI if group.reader.axis == 1 else fit.new_OI.T, stored)
                    changed.append(projection)
                hidden = fit.outputs(projection, group.reader.axis)
            else:
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


@dataclass(frozen=True)
class _Fit:
    """Fit of one layer's down projection, with what one run of the layer gave.

    Attributes:
        new_OI: The new weights, float64; None where none are better on held-out windows.
        old_OI: The old ones, float64.
        factor: What the layer multiplies the projection's output by.
        inputs: The projection's inputs, (windows, tokens, in) for each batch.
        before: The layer's outputs with the old weights, (windows, tokens, hidden) for each batch.
    """

    new_OI: Tensor | None
    old_OI: Tensor
    factor: float
    inputs: Sequence[Tensor]
    before: list[Tensor]

    @torch.no_grad()
    def outputs(self, projection: nn.Module, axis: int) -> list[Tensor]:
        """Returns the layer's outputs with the weights that the projection has now; the layer is not run again."""
        if self.new_OI is None:
            return self.before
        weight = projection.get_parameter("weight").double()
        change_IO = self.factor * ((weight if axis == 1 else weight.T) - self.old_OI).T
        pairs = zip(self.before, self.inputs, strict=True)
        return [(output.double() + inputs.double() @ change_IO).to(output.dtype) for output, inputs in pairs]


@torch.no_grad()
def _fit(walk: Layerwise, layer: int, projection: nn.Module, axis: int, hidden: list[Tensor], goals: list[Tensor]) -> _Fit:
    """Runs a layer once and fits its down projection to the goals."""
    weight = projection.get_parameter("weight")
    old_OI = (weight if axis == 1 else weight.T).double()
    factor = _factor(walk, layer, projection, hidden[0])
    every = torch.arange(old_OI.shape[1], device=old_OI.device)
    fitted, judge = NormalEquations(old_OI, every), NormalEquations(old_OI, every)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    held_out = False
    for index, (batch, goal) in enumerate(zip(hidden, goals, strict=True)):
        seen: dict[str, Tensor] = {}
        with watched_inputs({"h": projection}, seen.__setitem__):
            outputs.append(walk.call(layer, batch, batch=index))
        inputs.append(seen["h"].reshape(*batch.shape[:2], -1))
        first = len(batch) - (max(1, len(batch) // 8) if len(batch) > 1 else 0)
        missing = (goal - outputs[-1]).double() / factor  # beside what the projection gives now
        held_out = held_out or first < len(batch)
        for part, rows in ((fitted, slice(0, first)), (judge, slice(first, len(batch)))):
            _add(part, inputs[-1][rows, 1:], missing[rows, 1:], old_OI)
    if not held_out:
        judge = fitted
    best = min(DAMPINGS, key=lambda damping: judge.error(fitted.solve(damping)))
    better = judge.error(fitted.solve(best)) < judge.error(old_OI)
    if better and held_out:
        fitted.include(judge)
    return _Fit(fitted.solve(best) if better else None, old_OI, factor, inputs, outputs)


def _add(equations: NormalEquations, inputs: Tensor, missing: Tensor, old_OI: Tensor) -> None:
    """Adds inputs h, (windows, tokens, in), with the goal of ``W h``: what it gives now and what is missing beside that."""
    h_NI = inputs.reshape(-1, inputs.shape[-1]).double()
    z_NO = missing.reshape(-1, missing.shape[-1]) + h_NI @ old_OI.T
    equations.add_towards(h_NI.T @ h_NI, z_NO.T @ h_NI, float(z_NO.square().sum()))


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
