"""Re-fitting of the projections that read pruned channels, layer after layer, on the outputs of the pruned layers below.

For every cut group, the reading projection (down or output) gets the weights that best reproduce its old output from the kept channels, on
calibration text that went through the layers already pruned (:mod:`regraft.numerics.reconstruction`). The fit is affine if the projection
has a bias, and linear otherwise, so that the saved format does not change.

At any time, only the hidden states of the calibration text and one matrix of second moments are in memory, never all activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from regraft.models.layerwise import Walk, WholeWalk, watched_inputs
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.numerics.moments import Moments
from regraft.numerics.reconstruction import NormalEquations, best_damping
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
        for reader, kept in sorted(here.items(), key=lambda cut: _depth(module, cut[0], prefix)):
            name = reader.removeprefix(prefix).rpartition(".")[0]
            projection = module.get_submodule(name)
            fit, judges = _moments(walk, layer, module, projection, source_N)
            refit(projection, axes[reader], fit, judges, torch.tensor(kept, device=fit.total_D.device), method)
            full_name = reader.rpartition(".")[0]
            changed |= {f"{full_name}.{key}": value.detach() for key, value in projection.named_parameters()}
        walk.advance(layer, module)
        yield layer, changed


@torch.no_grad()
def refit(
    projection: nn.Module,
    axis: int,
    fit: Moments,
    judges: Sequence[Moments],
    channels: Tensor,
    method: RefitMethod,
    damping: float | None = None,
) -> None:
    """Re-fits a projection in place so that it uses only ``channels`` of its input.

    Args:
        projection: The projection, with ``weight`` and perhaps ``bias``.
        axis: Input axis of the weight.
        fit: Moments of the projection's inputs.
        judges: Moments of the projection's inputs on held-out text, for choosing the damping: one for each kind of text.
        channels: Kept input channels, int64, ascending.
        method: See :func:`compensate`.
        damping: A fixed damping; None chooses it by ``judges``.
    """
    parameters = dict(projection.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    old_OI = (weight if axis == 1 else weight.T).double()
    new_OI = torch.zeros_like(old_OI)
    if method == "least_squares":
        equations = _equations(old_OI, channels, fit, centred=bias is not None)
        others = [_equations(old_OI, channels, judge, centred=bias is not None) for judge in judges]
        chosen = best_damping(equations, others) if damping is None else damping
        for other in others:
            equations.include(other)
        new_OI[:, channels] = equations.solve(chosen)
    else:
        new_OI[:, channels] = old_OI[:, channels]
    if bias is not None:
        every = (fit, *judges)
        mean_I = sum((part.total_D for part in every), torch.zeros_like(fit.total_D)) / max(1, sum(part.count for part in every))
        bias.copy_(bias.double() + (old_OI - new_OI) @ mean_I)
    weight.copy_(new_OI if axis == 1 else new_OI.T)


def _equations(old_OI: Tensor, channels: Tensor, moments: Moments, *, centred: bool) -> NormalEquations:
    """Returns the normal equations of moments, which are centred where a bias absorbs the mean."""
    square_DD = moments.square_DD
    if centred:
        square_DD = torch.addr(square_DD, moments.mean_D, moments.mean_D, alpha=-moments.count)
    found = NormalEquations(old_OI, channels)
    found.add(square_DD)
    return found


def _moments(walk: Walk, layer: int, module: nn.Module, projection: nn.Module, source_N: Tensor | None) -> tuple[Moments, list[Moments]]:
    """Returns the moments of a projection's inputs on most windows of each batch, and on the rest of them by kind of text."""
    fit: list[Moments] = []
    judges: dict[int, Moments] = {}
    passed = 0

    def see(_name: str, rows_BTI: Tensor) -> None:
        nonlocal passed
        if not fit:
            fit.append(Moments.empty(rows_BTI.shape[-1], rows_BTI.device))
        windows = rows_BTI.shape[0]
        fitted = max(1, windows - max(1, windows // 8))
        fit[0].add(rows_BTI[:fitted])
        kinds = [0] * (windows - fitted) if source_N is None else source_N[passed + fitted : passed + windows].tolist()
        for kind in sorted(set(kinds)):
            mine = torch.tensor([fitted + place for place, other in enumerate(kinds) if other == kind], device=rows_BTI.device)
            judges.setdefault(kind, Moments.empty(rows_BTI.shape[-1], rows_BTI.device)).add(rows_BTI[mine])
        passed += windows

    with watched_inputs({"reader": projection}, see):
        walk.look(layer, module, until=projection)
    return fit[0], [judges[kind] for kind in sorted(judges)] or fit


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
