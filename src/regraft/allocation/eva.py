"""EVA (arXiv 2410.07170): ranks by the variance of the layer inputs that their leading directions explain."""

from __future__ import annotations

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import EVA, curve
from regraft.allocation.fill import fill
from regraft.plans import RankSpace


def eva(space: RankSpace) -> Ranks:
    """Returns the vector whose directions explain the most variance under the budget (section 3.3 there).

    EVA sorts the explained variance ratios of all modules together and keeps the largest until a sum of ranks is spent. Here the same
    sum of ratios is maximised under trainable parameters, among the choices, so that a wide module pays for its width.

    Raises:
        PlanError: The curve ``eva`` is not known: the explained variance ratios, summed over directions and modules.
    """
    return fill(space, curve(space, EVA))


ALLOCATORS.add("eva", ClosedForm("eva", eva))
