"""The surgeon in nats: what the predictions lose when a unit goes and the others are re-fitted, from one pass forwards and back.

For a reading projection W with ``C = E[x x']`` of its inputs and ``G = E[g g']``, g the gradient in its outputs of the log-likelihood of tokens
that are *drawn from the model's own predictions*, the divergence of the predictions after a change D of W is, to second order and with
inputs and gradients taken to be independent (K-FAC, arXiv 1503.05671; for pruning LLM Surgeon, arXiv 2312.17244),

    KL = 1/2 tr(D C D' G)        in nats for each token

so that removing the units S, the others re-fitted, costs ``1/2 tr([(C^-1)_SS]^-1 W_S' G W_S)``: :mod:`regraft.numerics.surgeon` with the metric
G/2. The scores of a group, added up from the lowest, are its damage at every size, and compare between groups: one threshold over all
layers means something, and the knapsack's curves are there without cutting anything (:mod:`regraft.surgery.predicted`).

The exact Fisher information of single units, ``E[(sum_t x_tj w_j'g_t)^2]``, would come from the same pass and count tokens that are not
independent, but a few tokens with very large inputs rule it: scaling by it made predictions worse where there are such (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.importance.activation import reading, rising
from regraft.importance.criteria import CRITERIA, Criterion, Evidence
from regraft.importance.stream import stream_scores
from regraft.models.trainable import only_these_train
from regraft.numerics.moments import Moments
from regraft.numerics.surgeon import removal_order
from regraft.plans import Group

BATCH_TOKENS = 1024


@dataclass
class TwoSided:
    """What one pass forwards and back tells about a projection.

    Attributes:
        inputs: Second moments C of its inputs.
        outputs: Second moments G of the gradients in its outputs.
    """

    inputs: Moments
    outputs: Moments


def surgeon_nats_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``surgeon_nats``: nats for each token that a unit's removal adds, rising in the order in which units leave."""
    assert evidence.windows is not None
    if evidence.passes is not None:
        raise InputError("criterion 'surgeon_nats' runs the whole model back, which --memory leaves no room for; use --criterion surgeon")
    groups = tuple(group for group in evidence.groups.groups if group.kind != "residual")
    parameters = dict(evidence.model.named_parameters())
    names = dict.fromkeys(reading(group).parameter.rpartition(".")[0] for group in groups)
    seen = two_sided(evidence.model, names, evidence.windows, evidence.seed)
    found: dict[str, Tensor] = {}
    for group in groups:
        member = reading(group)
        weight = parameters[member.parameter].detach()
        weight_OI = weight if member.axis == 1 else weight.T
        found[group.name] = unit_nats(group, weight_OI, seen[member.parameter.rpartition(".")[0]])
    stream = {group.name: stream_scores(evidence, group, lambda moments: moments.power_D, 2) for group in evidence.groups.of("residual")}
    return found | stream


def unit_nats(group: Group, weight_OI: Tensor, seen: TwoSided) -> Tensor:
    """Returns what each removal adds, in the order in which the units of a group leave.

    Args:
        group: Whose units lie along the inputs of the projection.
        weight_OI: Its weights, (out, in).
        seen: Of it.
    """
    member = reading(group)
    channels = [index for unit in range(group.units) for index in member.indices(unit)]
    order = torch.tensor(channels, device=weight_OI.device)
    metric_OO = 0.5 * seen.outputs.second_DD
    second_II = seen.inputs.second_DD[order][:, order]
    units, costs = removal_order(weight_OI[:, order], second_II, member.width, metric_OO=metric_OO)
    return rising(group.units, units, costs)


def two_sided(model: PreTrainedModel, names: Mapping[str, None], windows_NT: Tensor, seed: int) -> dict[str, TwoSided]:
    """Returns, by projection, what one pass over the windows tells.

    Memory beside the model: two matrices of second moments for each projection, and the activations of one batch. No gradient of a weight
    is ever formed.

    Args:
        model: In evaluation mode; left as it is.
        names: Of projections that read heads or feed-forward channels.
        windows_NT: Tokens, int64 (windows, tokens).
        seed: Of the tokens that are drawn.

    Raises:
        InputError: Windows of one token.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    found: dict[str, TwoSided] = {}
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The graph begins at the first projection: nothing before it is asked for a gradient.
            leaving[name] = output if output.requires_grad else output.detach().requires_grad_()
            entering[name] = inputs[0]
            return leaving[name]

        return see

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with only_these_train(model, ()):
            for ids_BT in windows_NT.split(max(1, BATCH_TOKENS // windows_NT.shape[1])):
                with torch.enable_grad():
                    drawn = _drawn_likelihood(model, ids_BT.to(model.device), generator)
                    gradients = torch.autograd.grad(drawn, list(leaving.values()))
                for name, gradient_BTO in zip(leaving, gradients, strict=True):
                    rows_BTI = entering[name].detach()
                    if name not in found:
                        found[name] = TwoSided(
                            Moments.empty(rows_BTI.shape[-1], rows_BTI.device), Moments.empty(gradient_BTO.shape[-1], rows_BTI.device)
                        )
                    found[name].inputs.add(rows_BTI)
                    found[name].outputs.add(gradient_BTO)
                entering.clear()
                leaving.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _drawn_likelihood(model: PreTrainedModel, ids_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the summed log-likelihood of one token drawn from every prediction."""
    logits_NV = model(input_ids=ids_BT, use_cache=False).logits.float().flatten(0, 1)
    with torch.no_grad():
        drawn_N = torch.multinomial(functional.softmax(logits_NV, dim=-1), 1, generator=generator).squeeze(1)
    return -functional.cross_entropy(logits_NV, drawn_N, reduction="sum")


CRITERIA.add("surgeon_nats", Criterion("surgeon_nats", needs_text=True, units=surgeon_nats_units, looks_at="gradients"))
