"""Scores of whole layers, and of the attention or the feed-forward network of a layer.

All criteria compare hidden states of the residual stream with and without a part, on calibration windows.

* ``block_influence``: one minus the cosine between a layer's output with and without the part, as a mean over tokens. For a whole layer
  this compares its input and its output (ShortGPT, arXiv 2403.03853, equation 1). A single pass through the layers gives all scores.
* ``angular``: the angle, divided by pi, between the input and the output of a run of consecutive layers (arXiv 2403.17887, section 3.2).
  The run is as long as the number of layers to remove. A layer gets the score of the best run that contains it, so that the lowest
  layers are neighbours. Parts of layers are compared one at a time.
* ``removal``: the Kullback-Leibler divergence of the predictions from those of the complete model when only this part is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.importance.criteria import CRITERIA, Criterion, Evidence
from regraft.models.layerwise import Layerwise, emptied, silenced
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, mean_divergence
from regraft.plans import WHOLE, Group

Compare = Callable[[Tensor, Tensor], Tensor]
"""A function from two hidden states (batch, tokens, hidden) to one number for each token (batch, tokens)."""


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return functional.cosine_similarity(first.double(), second.double(), dim=-1).clamp(-1.0, 1.0)


def influence(without: Tensor, after: Tensor) -> Tensor:
    """Returns one minus the cosine of each token."""
    return 1.0 - _cosine(without, after)


def angle(without: Tensor, after: Tensor) -> Tensor:
    """Returns the angle of each token over pi."""
    return torch.acos(_cosine(without, after)) / math.pi


def _mean(compare: Compare, first: list[Tensor], second: list[Tensor]) -> float:
    values = [compare(one, other) for one, other in zip(first, second, strict=True)]
    return float(sum(value.sum() for value in values)) / sum(value.numel() for value in values)


def _states(walk: Layerwise) -> list[list[Tensor]]:
    """Returns the input of each layer, and the output of the last."""
    states = [walk.first]
    for layer in range(len(walk.view.layers)):
        states.append(walk.run(layer, states[-1]))
    return states


def _without(walk: Layerwise, group: Group, entering: list[Tensor]) -> list[Tensor]:
    """Returns the output of a layer without the group: its input if the layer is removed, else the output of the other part."""
    assert group.layer is not None
    return entering if group.kind == "layer" else walk.run(group.layer, entering, silenced(walk.view, group))


def _walked(evidence: Evidence) -> Layerwise:
    assert evidence.windows is not None
    return Layerwise(ModelView(evidence.model), evidence.windows)


def influence_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``block_influence``."""
    return _one_at_a_time(evidence, influence)


def _one_at_a_time(evidence: Evidence, compare: Compare) -> dict[str, Tensor]:
    walk = evidence.how().walk()
    found: dict[str, Tensor] = {}
    for layer in walk.layers():
        here = [group for group in evidence.groups.groups if group.layer == layer]
        sums = dict.fromkeys((group.name for group in here), 0.0)
        tokens = 0

        def see(
            module: nn.Module,
            positional: tuple[Any, ...],
            named: dict[str, Any],
            output: Any,
            here: list[Group] = here,
            sums: dict[str, float] = sums,
        ) -> None:
            nonlocal tokens
            entering, leaving = positional[0] if positional else named["hidden_states"], _stream_of(output)
            for group in here:
                without = entering
                if group.kind != "layer":
                    with emptied(walk.view, group):
                        without = _stream_of(module.forward(*positional, **named))
                sums[group.name] += float(compare(without, leaving).sum())
            tokens += entering.shape[0] * entering.shape[1]

        handle = walk.view.layers[layer].register_forward_hook(see, with_kwargs=True)
        try:
            walk.advance(layer)
        finally:
            handle.remove()
        found |= {name: torch.tensor([total / tokens], dtype=torch.float64) for name, total in sums.items()}
    return found


def _stream_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def angular_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``angular``; ``evidence.consecutive`` is the length of the run."""
    found = _one_at_a_time(evidence, angle)
    layers = {group.layer: group for group in evidence.groups.of("layer")}
    length = min(evidence.consecutive, len(layers))
    if length < 2:
        return found
    states = _states(_walked(evidence))
    best = dict.fromkeys(layers, math.inf)
    for start in sorted(layer for layer in layers if layer is not None):
        run = range(start, start + length)
        if all(layer in layers for layer in run):
            distance = _mean(angle, states[start], states[start + length])
            best |= {layer: min(best[layer], distance) for layer in run}
    for layer, group in layers.items():
        if math.isfinite(best[layer]):
            found[group.name] = torch.tensor([best[layer]], dtype=torch.float64)
    return found


def removal_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``removal``, in nats per token."""
    walk = _walked(evidence)
    states = _states(walk)
    dense = [log_probabilities(logits) for logits in walk.logits(states[-1])]
    return {group.name: torch.tensor([divergence_without(walk, group, states, dense)]).double() for group in evidence.groups.groups}


def divergence_without(walk: Layerwise, group: Group, states: list[list[Tensor]], dense: list[Tensor]) -> float:
    """Returns the mean divergence per token, in nats, of a model that lacks one group.

    Args:
        walk: Walk through the complete model.
        group: A layer or a part of one.
        states: Input of each layer of the complete model.
        dense: Log-probabilities of the complete model, (batch, tokens, vocabulary) for each batch.
    """
    assert group.layer is not None
    hidden = _without(walk, group, states[group.layer])
    for above in range(group.layer + 1, len(walk.view.layers)):
        hidden = walk.run(above, hidden)
    return max(0.0, mean_divergence(walk.logits(hidden), dense))


CRITERIA.include(
    Criterion("block_influence", needs_text=True, units=influence_units, looks_at="channels", scores=WHOLE, reads=frozenset()),
)
CRITERIA.include(Criterion("angular", needs_text=True, units=angular_units, scores=WHOLE, reads=frozenset({"consecutive"})))
CRITERIA.include(Criterion("removal", needs_text=True, units=removal_units, scores=WHOLE, reads=frozenset()))
