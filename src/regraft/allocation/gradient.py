"""Ranks by the energy of the first gradients' leading singular values."""

from __future__ import annotations

from regraft.allocation.contract import ALLOCATORS, ClosedForm, Ranks
from regraft.allocation.features import GRADIENT_ENERGY, curve
from regraft.allocation.fill import fill
from regraft.plans import RankSpace


def gradient(space: RankSpace) -> Ranks:
    r"""Returns the rank vector that captures the most energy of the weights' gradients under the budget.

    A step :math:`-\eta\,[G]_r` along the best rank-r approximation of the gradient G of a weight lowers the loss by
    :math:`\eta \sum_{i \le r} \sigma_i(G)^2` to first order. The sum of that over the modules of all slots is maximised.

    Raises:
        PlanError: The slots lack the curve ``gradient_energy``.
    """
    return fill(space, curve(space, GRADIENT_ENERGY))


ALLOCATORS.include(ClosedForm("gradient", gradient))
