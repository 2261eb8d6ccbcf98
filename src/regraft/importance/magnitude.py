"""Magnitude scores: the sum of ``|w|`` (``l1``) or ``w**2`` (``l2``) over a unit's weights. Without recovery they give very poor models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from regraft.importance.criteria import CRITERIA, Criterion, Evidence, reduce_saliency


def magnitude_units(power: int) -> Callable[[Evidence], Mapping[str, Tensor]]:
    """Returns a scorer by ``sum(|w|**power)``. Granularity has no effect, because all terms are positive."""

    def units(evidence: Evidence) -> Mapping[str, Tensor]:
        parameters = dict(evidence.model.named_parameters())
        return {
            group.name: reduce_saliency(group, lambda name: parameters[name].detach().float().abs() ** power, "element", evidence.reduce)
            for groups in evidence.how().weights(evidence.groups)
            for group in groups
        }

    return units


CRITERIA.include(Criterion("l1", needs_text=False, units=magnitude_units(1), looks_at="weights", reads=frozenset({"reduce"})))
CRITERIA.include(Criterion("l2", needs_text=False, units=magnitude_units(2), looks_at="weights", reads=frozenset({"reduce"})))
