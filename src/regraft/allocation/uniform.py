"""The same rank in every slot: the baseline that every other allocation has to beat."""

from __future__ import annotations

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.plans import RankSpace


def uniform(space: RankSpace) -> Ranks:
    """Returns the uniform vector."""
    return space.uniform_ranks


ALLOCATORS.include(ClosedForm("uniform", uniform))
