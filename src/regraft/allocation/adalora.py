"""AdaLoRA (arXiv 2303.10512): ranks by the importance of singular triplets after a short training."""

from __future__ import annotations

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import ADALORA, curve
from regraft.allocation.fill import fill
from regraft.plans import RankSpace


def adalora(space: RankSpace) -> Ranks:
    """Returns the rank vector that keeps the most important triplets under the budget (equations 8 to 10 of the paper).

    AdaLoRA keeps the most important triplets of all modules up to a given sum of ranks. Here the sum of the same importance is
    maximised, over the allowed ranks, under a limit on trainable parameters.

    Raises:
        PlanError: The slots lack the curve ``adalora``: the importance of the triplets, largest first, summed over triplets and modules.
    """
    return fill(space, curve(space, ADALORA))


ALLOCATORS.include(ClosedForm("adalora", adalora))
