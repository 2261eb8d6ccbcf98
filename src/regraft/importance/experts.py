"""Scores of experts and of their channels by what they add to the stream for the tokens that are sent to them.

The score of expert j is the mean, over the tokens that are sent to it, of its router weight times the norm of its output:
``S_j = mean_t g_j(x_t) ||f_j(x_t)||`` (Lasby et al., REAP the Experts, arXiv 2510.13999, equation 9). An expert that is never chosen has
score 0.

The score of channel c of expert j is the energy of what it writes: ``sum_t (g_j(x_t) a_jc(x_t))^2 ||w_jc||^2``, with the activation
``a_jc`` and the column ``w_jc`` that reads it. That is the squared error which removing the channel alone makes, summed over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from regraft.compat import gated
from regraft.errors import ModelError
from regraft.groups.experts import Experts, Stacks, experts_of, stacks_of
from regraft.models.layerwise import Walk
from regraft.plans import Scores

NAME = "reap"
CHANNELS = "routed"
# Relative difference between the output of experts and the same by formula, beyond which the formula is not theirs.
_MOST_ROUNDING = 1e-2

See = Callable[[int, Tensor, Tensor, Any], None]


@torch.no_grad()
def score_experts(walk: Walk, fingerprint: str) -> Scores:
    """Returns the score of every expert.

    Args:
        walk: The model with its calibration windows.
        fingerprint: Its fingerprint.
    """
    values: dict[str, tuple[float, ...]] = {}
    for experts in _walked(walk):
        sums, counts = (torch.zeros(experts.count, dtype=torch.float64) for _ in range(2))

        def see(expert: int, hidden: Tensor, weights: Tensor, module: Any, sums: Tensor = sums, counts: Tensor = counts) -> None:
            norms = _alone(module, expert, hidden).to(torch.float64).norm(dim=-1)
            sums[expert] += (weights * norms).sum().cpu()
            counts[expert] += len(hidden)

        _advance(walk, experts, see)
        values[f"layers.{experts.layer}.experts"] = tuple((sums / counts.clamp(min=1)).tolist())
    return Scores(fingerprint, NAME, values)


@torch.no_grad()
def score_channels(walk: Walk, fingerprint: str) -> Scores:
    """Returns the score of every channel of every expert.

    Args:
        walk: The model with its calibration windows.
        fingerprint: Its fingerprint.

    Raises:
        ModelError: Experts compute otherwise than their module says.
    """
    values: dict[str, tuple[float, ...]] = {}
    for experts in _walked(walk):
        stacks = stacks_of(experts)
        energy = torch.zeros(experts.count, stacks.channels, dtype=torch.float64)
        checked: list[bool] = []

        def see(
            expert: int,
            hidden: Tensor,
            weights: Tensor,
            module: Any,
            stacks: Stacks = stacks,
            energy: Tensor = energy,
            experts: Experts = experts,
            checked: list[bool] = checked,
        ) -> None:
            channels = _activations(module, stacks, expert, hidden)
            reader_OI = _reader(module, stacks, expert)
            if not checked:
                checked.append(True)
                _check(experts, channels @ reader_OI.T, _alone(module, expert, hidden), module, stacks, expert)
            routed = (weights[:, None] * channels.to(torch.float64)).square().sum(0)
            energy[expert] += (routed * reader_OI.to(torch.float64).square().sum(0)).cpu()

        _advance(walk, experts, see)
        values |= {f"layers.{experts.layer}.experts.{index}.ffn": tuple(energy[index].tolist()) for index in range(experts.count)}
    return Scores(fingerprint, CHANNELS, values)


def _walked(walk: Walk) -> Any:
    """Yields the experts of a layer when the walk is there; layers without any are passed."""
    by_layer = {experts.layer: experts for experts in experts_of(walk.view.model)}
    for layer in walk.layers():
        if layer in by_layer:
            yield by_layer[layer]
        else:
            walk.advance(layer)


def _advance(walk: Walk, experts: Experts, see: See) -> None:
    """Runs the windows through a layer; ``see`` gets an expert's index, the tokens sent to it, their weights in float64, and the module."""
    busy: list[bool] = []

    def before(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if busy:
            return
        busy.append(True)  # the module may be called again, for one expert at a time
        hidden, chosen, weights = (*inputs, *named.values())[:3]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for expert in range(experts.count):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                see(expert, hidden[tokens], weights[tokens, place].to(torch.float64), module)
        busy.clear()

    with ExitStack() as hooked:
        hooked.callback(experts.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        walk.advance(experts.layer)


def _alone(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """Returns the output of one expert, (tokens, width)."""
    chosen = torch.full((len(hidden), 1), expert, device=hidden.device, dtype=torch.int64)
    return module(hidden, chosen, torch.ones(len(hidden), 1, device=hidden.device, dtype=hidden.dtype))


def _activations(module: Any, stacks: Stacks, expert: int, hidden: Tensor) -> Tensor:
    """Returns the channels of one expert, (tokens, channels)."""
    weight = module.get_parameter(stacks.writer)[expert]
    found = hidden @ (weight if stacks.transposed else weight.T)
    if stacks.biased:
        found = found + module.get_parameter(f"{stacks.writer}_bias")[expert]
    return gated(module, found) if stacks.gated else module.act_fn(found)


def _reader(module: Any, stacks: Stacks, expert: int) -> Tensor:
    """Returns the matrix that reads the channels of one expert, (width, channels)."""
    weight = module.get_parameter(stacks.reader)[expert]
    return weight.T if stacks.transposed else weight


def _check(experts: Experts, formula: Tensor, output: Tensor, module: Any, stacks: Stacks, expert: int) -> None:
    if stacks.biased:
        formula = formula + module.get_parameter(f"{stacks.reader}_bias")[expert]
    if (formula - output).norm() > _MOST_ROUNDING * output.norm():
        raise ModelError(f"'{experts.name}' computes otherwise than it says: the channels of its experts are not cut")
