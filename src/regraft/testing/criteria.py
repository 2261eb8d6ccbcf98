"""Checks that every criterion must pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.groups.discover import discover
from regraft.importance import Criterion, Evidence
from regraft.plans import Groups
from regraft.testing.require import generators_left_alone, require
from regraft.testing.toys import tiny_llama, windows

CHANNELS = tuple(range(63, -1, -1))


def check_criterion(criterion: Criterion) -> None:
    """Checks a criterion on a tiny Llama.

    1. One finite float64 number for every unit of every group, and nothing else.
    2. The same evidence gives the same scores, and the global generators are left alone.
    3. The model is as it was: weights, gradients, mode.
    4. Feed-forward channels in another order get the same scores in that order (unless the criterion looks at nothing).
    5. A feed-forward channel with zero weights is worth no more than any other, and a layer that writes zeros no more than any other layer.

    Raises:
        NonconformingError: With what the criterion did.
    """
    who = f"criterion '{criterion.name}'"
    require(bool(criterion.name.strip()) and bool(criterion.scores), f"{who} has no name, or scores no kind of group")
    model = tiny_llama()
    groups = discover(model, criterion.scores)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with generators_left_alone(who):
        first = _score(criterion, model, groups)
    _check_form(who, first, groups)
    torch.rand(1)
    again = _score(criterion, model, groups)
    require(all(torch.equal(first[name], again[name]) for name in first), f"{who} gives other scores for the same evidence")
    for name, parameter in model.named_parameters():
        require(torch.equal(parameter, before[name]), f"{who} changes the weight '{name}'")
        require(parameter.grad is None and parameter.requires_grad, f"{who} leaves a gradient on '{name}', or turns its gradient off")
    require(not model.training, f"{who} leaves the model in training mode")
    if criterion.looks_at != "nothing":
        _check_order(who, criterion, groups, first)
        _check_dead(who, criterion, groups)


def _score(criterion: Criterion, model: PreTrainedModel, groups: Groups) -> Mapping[str, Tensor]:
    return criterion.units(criterion.seen(Evidence(model, groups, windows(), seed=5)))


def _check_form(who: str, values: Mapping[str, Tensor], groups: Groups) -> None:
    named = groups.named()
    require(set(values) == set(named), f"{who} scores {sorted(set(values) ^ set(named))[:3]} too much or not at all")
    for name, scores in values.items():
        require(scores.shape == (named[name].units,), f"{who} gives {tuple(scores.shape)} for the {named[name].units} units of '{name}'")
        require(scores.dtype == torch.float64, f"{who} gives {scores.dtype} for '{name}'; float64 is wanted")
        require(bool(torch.isfinite(scores).all()), f"{who} gives a score of '{name}' that is not finite")


def _check_order(who: str, criterion: Criterion, groups: Groups, scores: Mapping[str, Tensor]) -> None:
    if "ffn" not in criterion.scores:
        return
    model, order = tiny_llama(), torch.tensor(CHANNELS)
    with torch.no_grad():
        layers: Any = model.model.layers
        for layer in layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order])
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    turned = _score(criterion, model, groups)
    for group in groups.of("ffn"):
        want, got = scores[group.name][order], turned[group.name]
        require(torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())), f"{who} depends on the order of channels")


def _check_dead(who: str, criterion: Criterion, groups: Groups) -> None:
    model = tiny_llama()
    with torch.no_grad():
        layers: Any = model.model.layers
        layer = layers[1]
        if "ffn" in criterion.scores:
            layer.mlp.gate_proj.weight[7] = 0.0
            layer.mlp.up_proj.weight[7] = 0.0
            layer.mlp.down_proj.weight[:, 7] = 0.0
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    values = _score(criterion, model, groups)
    if "ffn" in criterion.scores:
        scores = values["layers.1.ffn"]
        require(float(scores[7]) <= float(scores.min()) + 1e-9, f"{who} prefers a channel of zeros to others")
    elif "layer" in criterion.scores:
        scored = [float(values[f"layers.{index}.layer"][0]) for index in range(groups.layers)]
        require(scored[1] <= min(scored) + 1e-9, f"{who} prefers a layer that does nothing to others")
