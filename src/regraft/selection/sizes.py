"""Common parts of the knapsacks: the allowed sizes of a group, the damage at each size, and the comparison of solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.plans import Curve, Group
from regraft.selection.budget import MOST_MISSED, Budget

# Number of stream widths that are tried together with other cuts, which then close the gap to the target.
MOST_WIDTHS = 17


@dataclass(frozen=True)
class Choice:
    """A candidate solution.

    Attributes:
        kept: Group name to number of kept units.
        missed: Number of parameters by which the target is missed.
        damage: Sum of the groups' damages, in nats.
    """

    kept: dict[str, int]
    missed: float
    damage: float


def best_of(found: Sequence[Choice], smallest: float, total: float) -> Choice:
    """Returns the choice of least damage close to the target, or else the choice nearest to the target.

    Args:
        found: Candidates.
        smallest: Cost of the smallest step; close is half of it,
        total: and at most a hundredth of the cost of all.
    """
    near = [choice for choice in found if choice.missed <= min(0.5 * smallest, MOST_MISSED * total)]
    return min(near, key=lambda choice: choice.damage) if near else min(found, key=lambda choice: choice.missed)


def sizes_of(group: Group, budget: Budget) -> list[int]:
    """Returns the numbers of units that a group may keep, ascending, with the full number last."""
    return sorted({*range(budget.floor(group), group.units, budget.step(group)), group.units})


def widths_of(stream: Group, budget: Budget, *, alone: bool) -> list[int]:
    """Returns the stream widths to try: all if nothing else is cut, otherwise at most ``MOST_WIDTHS`` evenly spaced ones."""
    sizes = sizes_of(stream, budget)
    if alone or len(sizes) <= MOST_WIDTHS:
        return sizes
    places = np.linspace(0, len(sizes) - 1, MOST_WIDTHS).round().astype(int)
    return [sizes[int(place)] for place in places]


def damage_at(curve: Curve, kept: int) -> float:
    """Returns the damage at one size; see :func:`at_sizes`."""
    return float(at_sizes(curve, [kept])[0][0])


def at_sizes(curve: Curve, kept: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns damage and cost at given sizes.

    Values between measured sizes are interpolated linearly. Below the smallest measured size, the line through the two smallest ones is
    continued. Damage never falls when more units are removed.
    """
    sizes, cost = np.asarray(curve.kept, dtype=np.float64), np.asarray(curve.cost, dtype=np.float64)
    damage = np.maximum.accumulate(np.asarray(curve.damage_nats, dtype=np.float64)[::-1])[::-1]
    if len(sizes) > 1 and sizes[0] > 0:
        share = sizes[0] / (sizes[1] - sizes[0])
        damage = np.insert(damage, 0, damage[0] + share * (damage[0] - damage[1]))
        cost = np.insert(cost, 0, max(0.0, cost[0] - share * (cost[1] - cost[0])))
        sizes = np.insert(sizes, 0, 0.0)
    return np.interp(kept, sizes, damage), np.interp(kept, sizes, cost)
