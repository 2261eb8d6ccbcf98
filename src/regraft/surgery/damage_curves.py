"""Measurement of the damage of cutting one group alone: the curves for the knapsack selector.

For each group and each of a few sizes, the layer is replaced by a copy without the removed units and with its reading projection
re-fitted. Then the divergence of the model's predictions from the dense ones is measured on calibration windows that the fit did not
use. Only this layer and the later ones are run again.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.importance.depth import divergence_without
from regraft.models.layerwise import Layerwise, watched_inputs
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, mean_divergence
from regraft.numerics.moments import Moments, adder
from regraft.plans import WHOLE, Curve, Curves, Cut, Group, Groups, PrunePlan, Scores
from regraft.progress import Say, Step, say_nothing
from regraft.surgery.cut import cut
from regraft.surgery.refit_layerwise import Seen, refit

# Kept shares of a group at which the damage is measured; the curve is interpolated between them.
SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
FINE_STEPS = 32
# Limit for the measuring windows. Each window is run for every size of every group, and more of them improve the curves too little.
JUDGED_WINDOWS = 16
# So many layers correct the predicted curves.
MEASURED_LAYERS = 8
FEWEST_TURNS, MOST_TURNS, SECONDS_OF_TIMING = 5, 200, 0.5  # how often, and for how long, sizes are timed
# Of a re-fit that is measured, on other windows than it is fitted to. Chosen by the few rows that judge, it makes damage look too small.
_DAMPING = 1e-3
CostUnit = Literal["parameters", "bytes", "milliseconds"]


def measure_curves(
    view: ModelView,
    groups: Groups,
    scores: Scores,
    windows_NT: Tensor,
    *,
    only: Sequence[str],
    unit: CostUnit = "parameters",
    say: Say = say_nothing,
) -> Curves:
    """Returns damage against size for the groups that may be cut.

    Args:
        view: The dense model; it is not changed.
        groups: Groups of the model.
        scores: Scores that decide which units are kept at each size.
        windows_NT: Calibration tokens, int64 (windows, tokens): a quarter of them, from one to 16, measures; the rest fits.
        only: Names of the groups to measure.
        unit: Unit of the costs; milliseconds are measured during this call, on the device of the model.
        say: Called with one line for each layer.
    """
    wanted = [group for group in groups.groups if group.name in set(only)]
    costs = _Costs(view, unit, windows_NT.shape[1])
    prices = {group.name: costs.of(group, _sizes(group)) for group in wanted}  # for the weights in their stored dtype
    with float32_on_cpu(view.model):
        damages = _damages(view, replace(groups, groups=tuple(wanted)), scores, windows_NT, say)
    values = {group.name: Curve(_sizes(group), damages[group.name], prices[group.name]) for group in wanted}
    return _curves(view, groups, unit, values)


def predict_curves(
    view: ModelView,
    groups: Groups,
    scores: Scores,
    windows_NT: Tensor,
    *,
    only: Sequence[str],
    unit: CostUnit = "parameters",
    say: Say = say_nothing,
) -> Curves:
    """Returns damage against size from scores in nats, which add up to it; what they cannot tell, whole parts and the stream, is measured.

    Args:
        view: The dense model; left as it is.
        groups: Groups of the model.
        scores: Scores in nats for each token, ascending in the order in which the units of a group are removed.
        windows_NT: Calibration tokens, int64 (windows, tokens), for what is measured.
        only: Names of the groups.
        unit: What sizes are counted in.
        say: Called with one line for each layer that is measured.
    """
    wanted = [group for group in groups.groups if group.name in set(only)]
    measured = [group.name for group in wanted if group.kind in WHOLE or group.kind == "residual"]
    values: dict[str, Curve] = {}
    if measured:
        values |= measure_curves(view, groups, scores, windows_NT, only=measured, unit=unit, say=say).values
    costs = _Costs(view, unit, windows_NT.shape[1])
    for group in wanted:
        if group.name not in values:
            sizes = _sizes(group) if unit == "milliseconds" else _fine_sizes(group)
            values[group.name] = Curve(sizes, _predicted(scores.values[group.name], sizes), costs.of(group, sizes))
    return _curves(view, groups, unit, {group.name: values[group.name] for group in wanted})


def rescale_curves(
    view: ModelView,
    groups: Groups,
    scores: Scores,
    windows_NT: Tensor,
    curves: Curves,
    kept: Mapping[str, int],
    inputs: Mapping[str, Moments],
    *,
    say: Say = say_nothing,
) -> Curves:
    """Returns predicted curves times what measurements near the sizes that they led to say of them, group by group.

    The groups of at most eight layers are measured, once each, at the size that they were given; one that was left whole, where the first
    of it would go. Groups of the layers between get the factor between. A prediction to second order has the right order of sizes and of
    groups of a kind, but is too low for large parts, such as one of three heads. Each measurement runs the layers above: measured in
    every layer, the time would grow with the square of their number.

    Args:
        view: The dense model; left as it is.
        groups: Groups of the model.
        scores: The scores that the curves were predicted from.
        windows_NT: Tokens that measure, int64 (windows, tokens).
        curves: The predicted curves.
        kept: Number of kept units for each group that was cut by these curves.
        inputs: Moments of the inputs of the projections that read the groups, by module name, over calibration windows among which are
            those that measure; these are left out of the fit.
        say: Called with one line for each layer.
    """
    values = dict(curves.values)
    factors: dict[str, dict[int, float]] = {}
    with float32_on_cpu(view.model):
        walk = Layerwise(view, windows_NT)
        entering = [walk.first]
        layers = measured_layers(len(view.layers))
        judged: dict[str, Moments] = {}
        prefixes = tuple(f"{view.layer_name(layer)}." for layer in layers)
        readers = {name: view.model.get_submodule(name) for name in inputs if name.startswith(prefixes)}
        with watched_inputs(readers, adder(judged)):
            for layer in range(len(view.layers)):
                entering.append(walk.run(layer, entering[-1]))
        dense = [log_probabilities(logits) for logits in walk.logits(entering[-1])]
        for step, layer in enumerate(layers):
            for group in (group for group in groups.groups if group.layer == layer and group.name in values and group.kind not in WHOLE):
                size = _near(group, values[group.name], kept)
                promised = _predicted(scores.values[group.name], [size])[0]
                if size == group.units or promised <= 0:
                    continue
                reader = group.reader.parameter.rpartition(".")[0]
                seen = inputs[reader].without(judged[reader])
                found = _divergence(view, walk, layer, entering[layer], dense, group, scores.values[group.name], size, seen)
                factors.setdefault(group.kind, {})[layer] = max(0.0, found) / promised
            say(Step("measuring the damage near the chosen widths in layers", step + 1, len(layers)))
    for group in groups.groups:
        if group.name in values and group.layer is not None and factors.get(group.kind):
            factor = _between(factors[group.kind], group.layer)
            values[group.name] = replace(
                values[group.name], damage_nats=tuple(factor * damage for damage in values[group.name].damage_nats)
            )
    return replace(curves, values=values)


def measured_layers(layers: int) -> tuple[int, ...]:
    """Returns the layers whose groups are measured: all of a few, otherwise some at equal distances, the first and the last among them.

    >>> measured_layers(4), measured_layers(30)
    ((0, 1, 2, 3), (0, 4, 8, 12, 17, 21, 25, 29))
    """
    return tuple(sorted({round(place * (layers - 1) / (MEASURED_LAYERS - 1)) for place in range(MEASURED_LAYERS)}))


def _near(group: Group, curve: Curve, kept: Mapping[str, int]) -> int:
    """Returns the size at which a group is measured: the one that it was given, or the largest cut size where it was left whole."""
    size = kept.get(group.name, group.units)
    return curve.kept[-2] if size == group.units and len(curve.kept) > 1 else size


def _between(known: Mapping[int, float], layer: int) -> float:
    """Returns the value of a layer, linear between the measured layers on both sides of it, and constant beyond the outermost."""
    below, above = [near for near in known if near <= layer], [near for near in known if near >= layer]
    if not below or not above:
        return known[min(above) if above else max(below)]
    low, high = max(below), min(above)
    share = (layer - low) / (high - low) if high > low else 0.0
    return (1.0 - share) * known[low] + share * known[high]


def _predicted(scores: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    """Returns what the units that are gone at each size cost together, the cheapest first."""
    together = [0.0, *accumulate(sorted(scores))]
    return tuple(together[len(scores) - size] for size in sizes)


def _curves(view: ModelView, groups: Groups, unit: CostUnit, values: dict[str, Curve]) -> Curves:
    fixed = 0.0
    if unit != "milliseconds":
        per_parameter = 1 if unit == "parameters" else view.model.dtype.itemsize
        fixed = groups.parameters * per_parameter - sum(curve.cost[-1] for curve in values.values())
    return Curves(groups.fingerprint, unit, fixed, values)


def _damages(view: ModelView, groups: Groups, scores: Scores, windows_NT: Tensor, say: Say) -> dict[str, tuple[float, ...]]:
    """Returns for each group the divergence at each of its sizes."""
    judged = max(1, min(JUDGED_WINDOWS, windows_NT.shape[0] // 4))
    fitted = windows_NT[:-judged] if windows_NT.shape[0] > 1 else windows_NT
    fit_walk, judge_walk = Layerwise(view, fitted), Layerwise(view, windows_NT[-judged:])
    fit_hidden, inputs = fit_walk.first, [judge_walk.first]
    for layer in range(len(view.layers)):
        inputs.append(judge_walk.run(layer, inputs[-1]))
    dense = [log_probabilities(logits) for logits in judge_walk.logits(inputs[-1])]
    found: dict[str, tuple[float, ...]] = {}
    for layer in range(len(view.layers)):
        here = [group for group in groups.groups if group.layer == layer]
        projections = {group.name: _reading_module(view, group) for group in here if group.kind not in WHOLE}
        moments: dict[str, Moments] = {}
        with watched_inputs(projections, adder(moments)):
            fit_hidden = fit_walk.run(layer, fit_hidden)
        for group in here:
            if group.kind in WHOLE:
                found[group.name] = (divergence_without(judge_walk, group, inputs, dense), 0.0)
                continue
            damage = [
                _divergence(view, judge_walk, layer, inputs[layer], dense, group, scores.values[group.name], size, moments[group.name])
                for size in _sizes(group)[:-1]
            ]
            found[group.name] = (*damage, 0.0)
        if here:
            say(Step("measuring the damage of cutting layers", layer + 1, len(view.layers)))
    for group in groups.of("residual"):
        found[group.name] = _stream_damage(view, groups, scores, group, judge_walk, dense)
        say("measured the damage of a narrower stream")
    return found


@torch.no_grad()
def _stream_damage(
    view: ModelView, groups: Groups, scores: Scores, group: Group, walk: Layerwise, dense: list[Tensor]
) -> tuple[float, ...]:
    """Returns the damage of residual widths, from cut models; this needs memory for one of them in addition to the dense model."""
    damage: list[float] = []
    for size in _sizes(group)[:-1]:
        ranked = sorted(range(group.units), key=lambda channel: (-scores.values[group.name][channel], channel))
        cuts = (Cut(group.name, tuple(sorted(ranked[:size]))),)
        plan = PrunePlan(groups.fingerprint, scores.criterion, "", "per-layer", 0.0, 1, groups.parameters, groups.parameters, cuts)
        narrow = cut(view.model, groups, plan)
        logits = (narrow(input_ids=ids.to(narrow.device), use_cache=False).logits for ids in walk.batches)
        damage.append(mean_divergence(logits, dense))
    return (*damage, 0.0)


def _sizes(group: Group) -> tuple[int, ...]:
    """Returns the sizes at which a group is measured, ascending, with the full size last."""
    if group.kind in WHOLE:
        return (0, 1)
    return tuple(sorted({*(max(1, round(share * group.units)) for share in SHARES), group.units}))


def _fine_sizes(group: Group) -> tuple[int, ...]:
    """Returns the sizes at which a group's damage is predicted, which costs nothing, ascending, the whole group last."""
    return tuple(sorted({max(1, round(step * group.units / FINE_STEPS)) for step in range(1, FINE_STEPS + 1)}))


def _reading_module(view: ModelView, group: Group) -> nn.Module:
    return view.model.get_submodule(group.reader.parameter.rpartition(".")[0])


@torch.no_grad()
def _divergence(
    view: ModelView,
    walk: Layerwise,
    layer: int,
    entering: list[Tensor],
    dense: list[Tensor],
    group: Group,
    scores: Sequence[float],
    size: int,
    moments: Moments,
) -> float:
    """Returns the mean divergence per token, in nats, of the model with one group cut to ``size`` units."""
    module = copy.deepcopy(view.layers[layer])
    reader = group.reader
    name = reader.parameter.removeprefix(f"{view.layer_name(layer)}.").rpartition(".")[0]
    ranked = sorted(range(group.units), key=lambda unit: (-scores[unit], unit))[:size]
    channels = torch.tensor(sorted(index for unit in ranked for index in reader.indices(unit)), device=moments.total_D.device)
    refit(module.get_submodule(name), reader.axis, Seen(moments), channels, "least_squares", _DAMPING)
    hidden = walk.run(layer, entering, module)
    for above in range(layer + 1, len(view.layers)):
        hidden = walk.run(above, hidden)
    return mean_divergence(walk.logits(hidden), dense)


class _Costs:
    """Costs of groups at each size.

    Args:
        view: The model.
        unit: Unit of the costs.
        tokens: Number of tokens in one call of a projection, for milliseconds.
    """

    def __init__(self, view: ModelView, unit: CostUnit, tokens: int) -> None:
        self._view = view
        self._unit = unit
        self._tokens = tokens
        self._parameters = dict(view.model.named_parameters())
        self._timed: dict[tuple[object, ...], tuple[float, ...]] = {}

    def of(self, group: Group, sizes: Sequence[int]) -> tuple[float, ...]:
        """Returns the cost of a group at each size; groups with equal shapes are timed once."""
        if self._unit != "milliseconds":
            each = group.unit_parameters * (1 if self._unit == "parameters" else self._view.model.dtype.itemsize)
            return tuple(float(size * each) for size in sizes)
        shapes = (tuple(self._parameters[m.parameter].shape) for m in group.members)
        places = ((m.axis, m.side, m.width) for m in group.members)
        key = (*sizes, *shapes, *places)
        if key not in self._timed:
            self._timed[key] = _milliseconds(self._parameters, group, sizes, self._tokens)
        return self._timed[key]


@torch.no_grad()
def _milliseconds(parameters: Mapping[str, Tensor], group: Group, sizes: Sequence[int], tokens: int) -> tuple[float, ...]:
    """Returns the time of a group's projections at each size over ``tokens`` tokens.

    Sizes are timed in turns, and the shortest time of each counts, because other load on the machine can only add to it.
    """
    work: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for size in sizes:
        work[size] = []
        for member in group.members:
            weight = parameters[member.parameter]
            if weight.dim() == 2:
                part = weight.narrow(member.axis, 0, size * member.width).contiguous()
                weight_OI = part if (member.axis == 0) == (member.side == "out") else part.T.contiguous()
                work[size].append((torch.randn(tokens, weight_OI.shape[1]).to(weight_OI), weight_OI))
    shortest = dict.fromkeys(sizes, math.inf)
    started = time.perf_counter()
    for turn in range(MOST_TURNS):
        for size in sizes:
            _synchronize(work[size][0][0])
            start = time.perf_counter()
            for rows, weight_OI in work[size]:
                functional.linear(rows, weight_OI)
            _synchronize(work[size][0][0])
            shortest[size] = min(shortest[size], 1e3 * (time.perf_counter() - start))
        if turn >= FEWEST_TURNS and time.perf_counter() - started > SECONDS_OF_TIMING:
            break
    times = [shortest[size] for size in sizes]
    return tuple(max(times[: index + 1]) for index in range(len(times)))  # a larger size must not count as faster


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
