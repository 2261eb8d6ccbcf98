"""A criterion that reads weights alone: a unit matters as much as its weights are spread, and not as much as they are large."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.importance import Criterion, Evidence, reduce_saliency


def spread_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns the sum of squared differences of each weight from the mean of its matrix, float64 (units,) for each group."""
    weights = dict(evidence.model.named_parameters())

    def saliency(name: str) -> Tensor:
        weight = weights[name].detach().double()
        return (weight - weight.mean()).square()

    with torch.no_grad():
        return {group.name: reduce_saliency(group, saliency, "element", evidence.reduce) for group in evidence.groups.groups}


SPREAD = Criterion("spread", needs_text=False, units=spread_units, looks_at="weights", reads=frozenset({"reduce"}))
