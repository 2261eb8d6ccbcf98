"""Scores from activations on calibration text, one layer at a time, without gradients.

* ``wanda``: ``|w| * ||x||`` summed over a unit's weights, each with the norm of its own input channel (Wanda, arXiv 2306.11695,
  made structural). ``reduce=last`` uses only the reading projection, the variant that FLAP's authors call Wanda-sp.
* ``flap``: fluctuation ``Var(x_j) * ||W[:, j]||^2`` of the reading projection (FLAP, arXiv 2312.11983, equation 5): the squared output
  error when a channel is replaced by its mean.
* ``energy``: ``E[x_j^2] * ||W[:, j]||^2``, the squared contribution of a single channel to the output of the reading projection.
* ``surgeon``: the squared output error of the reading projection when a unit is removed *and the others are re-fitted*
  (:mod:`regraft.numerics.surgeon`). Units are ranked in the greedy order of removal; the score is the error that each removal adds.

The scores of a channel of the residual stream are summed over its many readers (:mod:`regraft.importance.residual`).

The reading projection of a group is the member that has the units on its input side: the down or the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from regraft.importance.criteria import CRITERIA, Criterion, Evidence, reduce_saliency
from regraft.importance.residual import stream_scores
from regraft.models.layerwise import watched_inputs
from regraft.models.view import ModelView
from regraft.numerics.moments import ChannelMoments, Moments
from regraft.numerics.surgeon import removal_order
from regraft.plans import Group, Member

Watched = ChannelMoments | Moments


def input_moments(evidence: Evidence, *, readers_only: bool, full: bool) -> Iterator[tuple[tuple[Group, ...], dict[str, Watched]]]:
    """Yields for each layer its groups, and the input moments of their projections by module name.

    Args:
        evidence: Evidence with calibration windows.
        readers_only: Whether only projections that read a group's channels are included.
        full: Whether to collect full second moments, O(width^2), instead of their diagonal.
    """
    walk = evidence.how().walk()
    for layer in walk.layers():
        groups = tuple(group for group in evidence.groups.groups if group.layer == layer)
        modules = _modules(walk.view, groups, readers_only)
        seen: dict[str, Watched] = {}

        def see(name: str, rows: Tensor, seen: dict[str, Watched] = seen) -> None:
            kind = Moments if full else ChannelMoments
            if name not in seen:
                seen[name] = kind.empty(rows.shape[-1], rows.device)
            seen[name].add(rows)

        with watched_inputs(modules, see):
            walk.advance(layer)
        yield groups, seen


def _modules(view: ModelView, groups: tuple[Group, ...], readers_only: bool) -> dict[str, nn.Module]:
    members = [member for group in groups for member in group.members if member.side == "in" or not readers_only]
    names = dict.fromkeys(member.parameter.rpartition(".")[0] for member in members)
    return {name: view.model.get_submodule(name) for name in names}


def wanda_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``wanda``; a bias counts as a weight with input one."""
    parameters = dict(evidence.model.named_parameters())
    found: dict[str, Tensor] = {}
    for groups, seen in input_moments(evidence, readers_only=False, full=False):
        inputs = {member.parameter: _input_axis(member) for group in groups for member in group.members}

        def saliency(name: str, seen: dict[str, Watched] = seen, inputs: Mapping[str, int] = inputs) -> Tensor:
            weight = parameters[name].detach().double().abs()
            moments = seen[name.rpartition(".")[0]]
            assert isinstance(moments, ChannelMoments)
            if weight.dim() == 1:
                return weight
            size = moments.power_D.sqrt()
            return weight * (size if inputs[name] == 1 else size[:, None])

        found |= {group.name: reduce_saliency(group, saliency, "element", evidence.reduce) for group in groups}
    return found | _stream(evidence, lambda moments: moments.power_D.sqrt(), 1)


def _stream(evidence: Evidence, channel_score: Callable[[ChannelMoments], Tensor], power: int) -> dict[str, Tensor]:
    return {group.name: stream_scores(evidence, group, channel_score, power) for group in evidence.groups.of("residual")}


def _input_axis(member: Member) -> int:
    """Returns the input axis of a matrix; GPT-2 stores matrices as (in, out)."""
    return member.axis if member.side == "in" else 1 - member.axis


def reader_units(channel_score: Callable[[ChannelMoments], Tensor]) -> Callable[[Evidence], Mapping[str, Tensor]]:
    """Returns a scorer: a channel's score times the squared norm of its column in the reading projection."""

    def units(evidence: Evidence) -> Mapping[str, Tensor]:
        parameters = dict(evidence.model.named_parameters())
        found: dict[str, Tensor] = {}
        for groups, seen in input_moments(evidence, readers_only=True, full=False):
            for group in groups:
                member = group.reader
                moments = seen[member.parameter.rpartition(".")[0]]
                assert isinstance(moments, ChannelMoments)
                squares = parameters[member.parameter].detach().double().square().sum(dim=1 - member.axis)
                channels = (channel_score(moments) * squares).cpu()
                found[group.name] = torch.stack([channels[list(member.indices(unit))].sum() for unit in range(group.units)])
        return found | _stream(evidence, channel_score, 2)

    return units


def surgeon_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the scores of ``surgeon``, which rise in the order of removal."""
    parameters = dict(evidence.model.named_parameters())
    found: dict[str, Tensor] = {}
    for groups, seen in input_moments(evidence, readers_only=True, full=True):
        for group in groups:
            member = group.reader
            moments = seen[member.parameter.rpartition(".")[0]]
            assert isinstance(moments, Moments)
            weight = parameters[member.parameter].detach()
            weight_OI = weight if member.axis == 1 else weight.T
            # The channels of one unit need not be adjacent: a unit of query heads has one head in every key-value group.
            order = torch.tensor([index for unit in range(group.units) for index in member.indices(unit)], device=weight.device)
            second_II = moments.second_DD[order][:, order]
            found[group.name] = rising(group.units, *removal_order(weight_OI[:, order], second_II, member.width))
    return found | _stream(evidence, lambda moments: moments.power_D, 2)


def rising(units: int, order: list[int], costs: list[float]) -> Tensor:
    """Returns the cost of each unit's removal, made to rise strictly in the order of removal."""
    values = torch.zeros(units, dtype=torch.float64)
    highest = 0.0
    smallest = max(costs, default=0.0) * 1e-12 + torch.finfo(torch.float64).tiny
    for unit, cost in zip(order, costs, strict=True):
        highest = max(highest + smallest, cost)
        values[unit] = highest
    return values


CRITERIA.include(Criterion("wanda", needs_text=True, units=wanda_units, looks_at="channels", reads=frozenset({"reduce"})))
CRITERIA.include(
    Criterion("flap", needs_text=True, units=reader_units(lambda moments: moments.variance_D), looks_at="channels", reads=frozenset()),
)
CRITERIA.include(
    Criterion("energy", needs_text=True, units=reader_units(lambda moments: moments.power_D), looks_at="channels", reads=frozenset()),
)
CRITERIA.include(Criterion("surgeon", needs_text=True, units=surgeon_units, reads=frozenset()))
