"""AdaLoRA (arXiv 2303.10512): ranks by the importance of the singular triplets of adapters that were trained for a while."""

from __future__ import annotations

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import ADALORA, curve
from regraft.allocation.fill import fill
from regraft.plans import RankSpace


def adalora(space: RankSpace) -> Ranks:
    """Returns the vector that keeps the most important triplets under the budget (equations 8 to 10 there).

    AdaLoRA keeps the triplets with the largest sensitivity of all modules until a sum of ranks is spent. Here the sum of the same
    importance is maximised under trainable parameters, among the choices.

    Raises:
        PlanError: The curve ``adalora`` is not known: the importance of the triplets, largest first, summed over triplets and modules.
    """
    return fill(space, curve(space, ADALORA))


ALLOCATORS.add("adalora", ClosedForm("adalora", adalora))
