"""Ranks in proportion to the damage that pruning did to a slot."""

from __future__ import annotations

import numpy as np

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import IMPORTANCE_REMOVED, SHARE_PRUNED, has_plain, plain
from regraft.allocation.fill import proportional_to
from regraft.errors import PlanError
from regraft.plans import RankSpace


def proportional(space: RankSpace) -> Ranks:
    """Returns ranks in proportion to the share pruned and to the importance removed, each against its mean over the slots.

    Where only one of the two is known it counts alone; where nothing was pruned every slot counts the same.

    Raises:
        PlanError: Neither is known.
    """
    known = [plain(space, name) for name in (SHARE_PRUNED, IMPORTANCE_REMOVED) if has_plain(space, name)]
    if not known:
        raise PlanError(
            f"the slots have neither '{SHARE_PRUNED}' nor '{IMPORTANCE_REMOVED}'; measure one first, or choose another --method"
        )
    damage = sum((values / values.mean() for values in known if values.any()), start=np.zeros(len(space.slots)))
    return proportional_to(space, damage)


ALLOCATORS.add("proportional", ClosedForm("proportional", proportional))
