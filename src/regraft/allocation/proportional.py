"""Ranks in proportion to the damage of pruning."""

from __future__ import annotations

import numpy as np

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import IMPORTANCE_REMOVED, SHARE_PRUNED, has_plain, plain
from regraft.allocation.fill import proportional_to
from regraft.errors import PlanError
from regraft.plans import RankSpace


def proportional(space: RankSpace) -> Ranks:
    """Returns ranks in proportion to the sum of the pruned share and the removed importance, each divided by its mean over the slots.

    If only one of the two is known, it is used alone. If nothing was pruned, every slot has the same weight.

    Raises:
        PlanError: Neither of the two is known.
    """
    known = [plain(space, name) for name in (SHARE_PRUNED, IMPORTANCE_REMOVED) if has_plain(space, name)]
    if not known:
        raise PlanError(
            "proportional ranks follow what pruning removed from each layer, which only a model that regraft pruned records; prune it "
            "first, or choose another `method`"
        )
    damage = sum((values / values.mean() for values in known if values.any()), start=np.zeros(len(space.slots)))
    return proportional_to(space, damage)


ALLOCATORS.include(ClosedForm("proportional", proportional))
