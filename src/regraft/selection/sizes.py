"""What knapsacks share: the sizes that a group may have, the damage at each, and which of several answers is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.plans import Curve, Group
from regraft.selection.budget import Budget

# Widths of the stream that are tried beside other cuts; what they leave open the others close.
MOST_WIDTHS = 17


@dataclass(frozen=True)
class Choice:
    """An answer.

    Attributes:
        kept: Units that stay, by group.
        missed: By how many parameters it misses the target.
        damage: Sum of the groups' damages, in nats.
    """

    kept: dict[str, int]
    missed: float
    damage: float


def best_of(found: Sequence[Choice], smallest: float) -> Choice:
    """Returns the least damage among what meets the target within half of the smallest step; where nothing does, what comes nearest."""
    near = [choice for choice in found if choice.missed <= 0.5 * smallest]
    return min(near, key=lambda choice: choice.damage) if near else min(found, key=lambda choice: choice.missed)


def sizes_of(group: Group, budget: Budget) -> list[int]:
    """Returns the numbers of units that a group may keep, ascending; the whole group last."""
    return sorted({*range(budget.floor(group), group.units, budget.step(group)), group.units})


def widths_of(stream: Group, budget: Budget, *, alone: bool) -> list[int]:
    """Returns the widths of the stream that are tried: all where nothing else is cut, a spread of them beside other cuts."""
    sizes = sizes_of(stream, budget)
    if alone or len(sizes) <= MOST_WIDTHS:
        return sizes
    places = np.linspace(0, len(sizes) - 1, MOST_WIDTHS).round().astype(int)
    return [sizes[int(place)] for place in places]


def damage_at(curve: Curve, kept: int) -> float:
    """Returns the damage at a size: between measured sizes by a line, and never less for fewer units."""
    return float(at_sizes(curve, [kept])[0][0])


def at_sizes(curve: Curve, kept: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns damage and cost at each of some sizes: between measured ones by a line, below the smallest along the line that ends there.

    Damage never falls where units go.
    """
    sizes, cost = np.asarray(curve.kept, dtype=np.float64), np.asarray(curve.cost, dtype=np.float64)
    damage = np.maximum.accumulate(np.asarray(curve.damage_nats, dtype=np.float64)[::-1])[::-1]
    if len(sizes) > 1 and sizes[0] > 0:
        share = sizes[0] / (sizes[1] - sizes[0])
        damage = np.insert(damage, 0, damage[0] + share * (damage[0] - damage[1]))
        cost = np.insert(cost, 0, max(0.0, cost[0] - share * (cost[1] - cost[0])))
        sizes = np.insert(sizes, 0, 0.0)
    return np.interp(kept, sizes, damage), np.interp(kept, sizes, cost)
