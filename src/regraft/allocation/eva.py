"""EVA (arXiv 2410.07170): ranks by the variance of a module's inputs along their leading directions."""

from __future__ import annotations

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import EVA, curve
from regraft.allocation.fill import fill
from regraft.plans import RankSpace


def eva(space: RankSpace) -> Ranks:
    """Returns the rank vector whose directions explain the most variance under the budget (section 3.3 of the paper).

    EVA sorts the explained variance ratios of all modules together and keeps the largest ones up to a given sum of ranks. Here the same
    sum of ratios is maximised, over the allowed ranks, under a limit on trainable parameters, so that a wide module costs more.

    Raises:
        PlanError: The slots lack the curve ``eva``: the explained variance ratios, summed over directions and modules.
    """
    return fill(space, curve(space, EVA))


ALLOCATORS.include(ClosedForm("eva", eva))
