"""Random scores: the baseline that any criterion has to beat, and a strong one (LLM-Pruner, arXiv 2305.11627, table 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.importance.criteria import CRITERIA, Criterion, Evidence


def random_units(evidence: Evidence) -> Mapping[str, Tensor]:
    """Returns uniform numbers from the seed, in the order of the groups."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return {group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) for group in evidence.groups.groups}


CRITERIA.include(Criterion("random", needs_text=False, units=random_units, looks_at="nothing", reads=frozenset({"seed"})))
