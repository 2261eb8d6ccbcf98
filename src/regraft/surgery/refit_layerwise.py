"""Re-fitting of the projections that read pruned channels, layer after layer, on the outputs of the pruned layers below.

For every cut group, the reading projection (down or output) gets the weights that best reproduce its old output from the kept channels, on
calibration text that went through the layers already pruned (:mod:`regraft.numerics.reconstruction`). The fit is affine if the projection
has a bias, and linear otherwise, so that the saved format does not change.

At any time, only the hidden states of the calibration text and one matrix of second moments are in memory, never all activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft.models.layerwise import Walk, WholeWalk, watched_inputs
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import replaced_forwards
from regraft.models.view import ModelView
from regraft.numerics.moments import Moments
from regraft.numerics.reconstruction import JudgingRows, NormalEquations, best_damping
from regraft.plans import Cut, Group, Groups

RefitMethod = Literal["least_squares", "mean"]


def compensate(
    view: ModelView, groups: Groups, cuts: tuple[Cut, ...], windows_NT: Tensor, method: RefitMethod, source_N: Tensor | None = None
) -> dict[str, Tensor]:
    """Returns new tensors for the reading projections of the cut groups, at full width.

    Their columns of removed channels are zero; :func:`regraft.surgery.cut.cut` takes the tensors as ``changed``.

    Args:
        view: The model before the cut; it is not changed.
        groups: Groups of the model.
        cuts: Cuts of heads, query heads and feed-forward channels; all other cuts are made before.
        windows_NT: Calibration tokens, int64 (windows, tokens); at least one in eight windows is held out to choose the damping.
        method: ``least_squares``; or ``mean``, which adds the mean contribution of the removed channels to the bias, if there is one.
        source_N: Kind of text of each window, int64 (windows,): the damping is chosen for the kind that is fitted worst. None: all windows
            are of one kind.
    """
    stored = view.model.dtype
    with float32_on_cpu(view.model):
        walk = WholeWalk(view, windows_NT, stored)
        return {name: tensor for _, changed in refitted(walk, groups, cuts, method, source_N) for name, tensor in changed.items()}


def refitted(
    walk: Walk, groups: Groups, cuts: tuple[Cut, ...], method: RefitMethod, source_N: Tensor | None = None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields each layer with the new tensors of its reading projections; :func:`compensate` returns those of all layers."""
    named = groups.named()
    axes = {reader.parameter: reader.axis for reader in (named[entry.group].reader for entry in cuts)}
    for layer in walk.layers():
        here = _by_reader([(named[entry.group], entry.kept) for entry in cuts if named[entry.group].layer == layer])
        module = walk.changeable(layer) if here else walk.view.layers[layer]
        prefix = f"{walk.view.layer_name(layer)}."
        changed: dict[str, Tensor] = {}
        done: dict[nn.Module, Callable[..., Any]] = {}
        for reader, kept in sorted(here.items(), key=lambda cut: _depth(module, cut[0], prefix)):
            name = reader.removeprefix(prefix).rpartition(".")[0]
            projection = module.get_submodule(name)
            part = _part(module, name, [other.removeprefix(prefix) for other in here if other != reader]) if walk.roomy else None
            with replaced_forwards(done):
                seen, again = _seen(walk, layer, _Reader(module, projection, part), source_N)
            if part is not None and again is not None:
                done[part] = again
            refit(projection, axes[reader], seen, torch.tensor(kept, device=seen.fit.total_D.device), method)
            full_name = reader.rpartition(".")[0]
            changed |= {f"{full_name}.{key}": value.detach() for key, value in projection.named_parameters()}
        with replaced_forwards(done):
            walk.advance(layer, module)
        yield layer, changed


def _part(module: nn.Module, name: str, others: Sequence[str]) -> nn.Module | None:
    """Returns the part of a layer, such as attention, that ends with a projection; None where there is none, or others lie in it too."""
    parent = name.rpartition(".")[0]
    if not parent or any(other.startswith(f"{parent}.") for other in others):
        return None
    return module.get_submodule(parent)


class _Again:
    """A part of a layer that was run once: what its last projection gives now, without what comes before, which has not changed.

    Args:
        projection: The projection whose output the part returns.
    """

    def __init__(self, projection: nn.Module) -> None:
        self._projection = projection
        self._inputs: list[Tensor] = []
        self._returned: list[int | None] = []  # items that the part returns beside its output; None where it returns a tensor alone
        self._next = 0
        self.faithful = True
        self._last: Tensor | None = None

    def __call__(self, *_positional: Any, **_named: Any) -> Any:
        """Returns what the part returns for the next batch, in the order of the first run."""
        place = self._next % len(self._inputs)
        self._next += 1
        output, more = self._projection(self._inputs[place]), self._returned[place]
        return output if more is None else (output, *(None for _ in range(more)))

    @contextmanager
    def watching(self, part: nn.Module) -> Iterator[None]:
        """Keeps the projection's inputs inside the block, and sees whether the part returns its output unchanged and nothing else."""
        handles = [self._projection.register_forward_hook(self._see), part.register_forward_hook(self._compare)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._inputs.append(inputs[0].detach())
        self._last = output

    def _compare(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        first, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        same = self._last is not None and first.shape == self._last.shape and torch.equal(first, self._last)
        self.faithful = self.faithful and same and all(item is None for item in others or ())
        self._returned.append(None if others is None else len(others))


@dataclass(frozen=True)
class Seen:
    """Inputs of a projection.

    Attributes:
        fit: Moments of those that are fitted.
        rest: Moments of those that choose the damping, and are fitted with it last; None where it is fixed.
        judges: The rows of the latter, (rows, in) for each kind of text.
    """

    fit: Moments
    rest: Moments | None = None
    judges: tuple[Tensor, ...] = ()


@torch.no_grad()
def refit(projection: nn.Module, axis: int, seen: Seen, channels: Tensor, method: RefitMethod, damping: float | None = None) -> None:
    """Re-fits a projection in place so that it uses only ``channels`` of its input.

    Args:
        projection: The projection, with ``weight`` and perhaps ``bias``.
        axis: Input axis of the weight.
        seen: The projection's inputs.
        channels: Kept input channels, int64, ascending.
        method: See :func:`compensate`.
        damping: A fixed damping; None chooses it by the judges of ``seen``.
    """
    parameters = dict(projection.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    old_OI = (weight if axis == 1 else weight.T).double()
    new_OI = torch.zeros_like(old_OI)
    every = seen.fit if seen.rest is None else seen.fit + seen.rest
    if method == "least_squares":
        if damping is None:
            rows = (rows_NI - rows_NI.mean(dim=0) if bias is not None else rows_NI for rows_NI in seen.judges)
            judges = [JudgingRows(old_OI, channels, rows_NI) for rows_NI in rows]
            damping = best_damping(_equations(old_OI, channels, seen.fit, centred=bias is not None), judges)
        new_OI[:, channels] = _equations(old_OI, channels, every, centred=bias is not None).solve(damping)
    else:
        new_OI[:, channels] = old_OI[:, channels]
    if bias is not None:
        bias.copy_(bias.double() + (old_OI - new_OI) @ every.mean_D)
    weight.copy_(new_OI if axis == 1 else new_OI.T)


def _equations(old_OI: Tensor, channels: Tensor, moments: Moments, *, centred: bool) -> NormalEquations:
    """Returns the normal equations of moments, which are centred where a bias absorbs the mean."""
    square_DD = moments.square_DD
    if centred:
        square_DD = torch.addr(square_DD, moments.mean_D, moments.mean_D, alpha=-moments.count)
    found = NormalEquations(old_OI, channels)
    found.add(square_DD)
    return found


@dataclass(frozen=True)
class _Reader:
    """A projection, its layer, and the part of the layer that ends with it."""

    layer: nn.Module
    projection: nn.Module
    part: nn.Module | None


def _seen(walk: Walk, layer: int, reader: _Reader, source_N: Tensor | None) -> tuple[Seen, _Again | None]:
    """Returns a projection's inputs, and its part as it can be run again cheaply, if it can.

    Most windows of each batch are fitted, and the rest judges, by kind of text.
    """
    parts: list[Moments] = []
    judges: dict[int, list[Tensor]] = {}
    single: list[Tensor] = []
    passed = 0

    def see(_name: str, rows_BTI: Tensor) -> None:
        nonlocal passed
        width, windows = rows_BTI.shape[-1], rows_BTI.shape[0]
        if not parts:
            parts.extend(Moments.empty(width, rows_BTI.device) for _ in range(2))
        fitted = max(1, windows - max(1, windows // 8))
        parts[0].add(rows_BTI[:fitted])
        parts[1].add(rows_BTI[fitted:])
        for window in range(fitted, windows):
            kind = 0 if source_N is None else int(source_N[passed + window])
            judges.setdefault(kind, []).append(rows_BTI[window].reshape(-1, width).clone())
        if windows == 1:
            single.append(rows_BTI.reshape(-1, width))
        passed += windows

    again = _Again(reader.projection) if reader.part is not None else None
    with ExitStack() as watches:
        watches.enter_context(watched_inputs({"reader": reader.projection}, see))
        if again is not None and reader.part is not None:
            watches.enter_context(again.watching(reader.part))
        walk.look(layer, reader.layer, until=reader.part or reader.projection)
    again = again if again is not None and again.faithful else None
    if not judges:  # a single window cannot be spared, so that it judges what is fitted to it
        return Seen(parts[0], None, tuple(single)), again
    return Seen(parts[0], parts[1], tuple(torch.cat(judges[kind]) for kind in sorted(judges))), again


def _by_reader(here: Sequence[tuple[Group, Sequence[int]]]) -> dict[str, list[int]]:
    """Returns the kept channels of each reading projection; heads and query heads share one projection."""
    found: dict[str, set[int]] = {}
    for group, kept in here:
        reader = group.reader
        channels = {index for unit in kept for index in reader.indices(unit)}
        found[reader.parameter] = found.get(reader.parameter, channels) & channels
    return {name: sorted(channels) for name, channels in found.items()}


def _depth(module: nn.Module, reader: str, prefix: str) -> int:
    """Returns the position of a projection in its layer, so that attention is re-fitted before later projections."""
    name = reader.removeprefix(prefix).rpartition(".")[0]
    return [found for found, _ in module.named_modules()].index(name)
