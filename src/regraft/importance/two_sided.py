"""The surgeon in nats: what the predictions lose when a unit goes and the others are re-fitted, from one pass forwards and back.

For a reading projection W with ``C = E[x x']`` of its inputs and ``G = E[g g']``, g the gradient in its outputs of the log-likelihood of
tokens that are *drawn from the model's own predictions*, the divergence of the predictions after a change D of W is, to second order and
with inputs and gradients taken to be independent (K-FAC, arXiv 1503.05671; for pruning LLM Surgeon, arXiv 2312.17244),

    KL = 1/2 tr(D C D' G)        in nats for each token

so that removing the units S, the others re-fitted, costs ``1/2 tr([(C^-1)_SS]^-1 W_S' G W_S)``: :mod:`regraft.numerics.surgeon` with the
metric G/2. The scores of a group, added up from the lowest, are its damage at every size, and compare between groups: one threshold over
all layers means something, and the knapsack's curves are there without cutting anything (:mod:`regraft.surgery.damage_curves`).

The exact Fisher information of single units, ``E[(sum_t x_tj w_j'g_t)^2]``, would come from the same pass and count tokens that are not
independent, but a few tokens with very large inputs rule it: scaling by it made predictions worse where there are such (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from regraft.importance.activation import rising
from regraft.importance.criteria import CRITERIA, Criterion, Evidence
from regraft.importance.reader_moments import ReaderMoments
from regraft.importance.residual import stream_scores
from regraft.numerics.surgeon import removal_order
from regraft.plans import Group


def surgeon_nats_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``surgeon_nats``: nats for each token that a unit's removal adds, rising in the order in which units leave."""
    groups = tuple(group for group in evidence.groups.groups if group.kind != "residual")
    parameters = dict(evidence.model.named_parameters())
    seen = evidence.how().reader_moments(readers(groups), evidence.seed)
    found: dict[str, Tensor] = {}
    for group in groups:
        member = group.reader
        weight = parameters[member.parameter].detach()
        weight_OI = weight if member.axis == 1 else weight.T
        found[group.name] = unit_nats(group, weight_OI, seen[member.parameter.rpartition(".")[0]])
    stream = {group.name: stream_scores(evidence, group, lambda moments: moments.power_D, 2) for group in evidence.groups.of("residual")}
    return found | stream


def readers(groups: Iterable[Group]) -> tuple[str, ...]:
    """Returns the names of the modules that read the channels of groups, each once."""
    return tuple(dict.fromkeys(group.reader.parameter.rpartition(".")[0] for group in groups))


def unit_nats(group: Group, weight_OI: Tensor, seen: ReaderMoments) -> Tensor:
    """Returns what each removal adds, in the order in which the units of a group leave.

    Args:
        group: A group whose units lie along the inputs of the projection.
        weight_OI: Weights of the projection, (out, in).
        seen: Moments of the projection.
    """
    member = group.reader
    channels = [index for unit in range(group.units) for index in member.indices(unit)]
    order = torch.tensor(channels, device=weight_OI.device)
    metric_OO = 0.5 * seen.outputs.second_DD
    second_II = seen.inputs.second_DD[order][:, order]
    units, costs = removal_order(weight_OI[:, order], second_II, member.width, metric_OO=metric_OO)
    return rising(group.units, units, costs)


CRITERIA.include(
    Criterion(
        "surgeon_nats",
        needs_text=True,
        units=surgeon_nats_units,
        looks_at="gradients",
        reads=frozenset({"seed"}),
        in_nats=True,
        between_layers=True,
    ),
)
