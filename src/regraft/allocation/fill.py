"""From what a rank is worth in each slot to the best rank vector under the budget, and the moves from one vector to the next.

Nothing here enumerates rank vectors: the sum of gains is maximised by dynamic programming over the slots (a multiple-choice knapsack,
as :mod:`regraft.selection.knapsack` is for widths).
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.contract import Ranks
from regraft.plans import RankSpace

# Costs are counted in steps of their greatest common divisor. Where that gives too fine a grid for this many entries of the table, all
# slots together, or for the least number of steps, they are rounded up to a coarser one.
_ENTRIES = 400_000
_LEAST_STEPS = 2048
_ROUGH_STEPS = 512


def fill(space: RankSpace, gains: NDArray[np.float64], *, rough: bool = False) -> Ranks:
    """Returns the rank vector with the largest sum of gains under the budget.

    Exact where the greatest common divisor of all costs goes into the budget few enough times (tens of thousands for ten slots). Elsewhere
    costs are rounded up to a coarser grid, so that the budget holds, and what the rounding left is spent by upgrades and swaps.

    Args:
        space: The slots, choices and budget.
        gains: (L, C) what each choice is worth in each slot, in any unit; need be neither increasing nor concave.
        rough: On a coarse grid in any case, many times faster: for worths that are drawn at random.
    """
    assert gains.shape == (len(space.slots), len(space.choices))
    costs = choice_costs(space)
    floor = costs[:, 0].sum()
    extra = costs - costs[:, :1]  # every slot has the smallest rank; only what is above is up for choice
    room = space.budget - int(floor)
    step = reduce(math.gcd, (int(cost) for cost in extra.flat), 0) or 1
    most = _ROUGH_STEPS if rough else max(_LEAST_STEPS, _ENTRIES // len(space.slots))
    exact = room // step <= most
    if not exact:
        step = -(-room // most)
    weights = -(-extra // step)
    allowed = choice_allowed(space)
    ranks = _knapsack(np.where(allowed, gains, -np.inf), weights, room // step)
    vector = tuple(space.choices[index] for index in ranks)
    return vector if exact else improve(space, vector, gains)


def _knapsack(gains: NDArray[np.float64], weights: NDArray[np.int64], capacity: int) -> list[int]:
    """Returns the index of the choice in every slot with the largest sum of gains and a sum of weights up to ``capacity``.

    Args:
        gains: (L, C), minus infinity where a choice is not allowed; the first always is.
        weights: (L, C) whole numbers, zero in the first column.
        capacity: Whole number.
    """
    best = np.zeros(capacity + 1)
    table = np.zeros((len(gains), capacity + 1), dtype=np.int16)
    for slot, (values, sizes) in enumerate(zip(gains, weights, strict=True)):
        after = best + values[0]
        for index in range(1, len(values)):
            size = int(sizes[index])
            if size > capacity or values[index] == -np.inf:
                continue
            candidate = best[: capacity + 1 - size] + values[index]
            better = candidate > after[size:]
            after[size:][better] = candidate[better]
            table[slot, size:][better] = index
        best = after
    place, chosen = capacity, list[int]()
    for slot in range(len(gains) - 1, -1, -1):
        index = int(table[slot, place])
        chosen.append(index)
        place -= int(weights[slot, index])
    return chosen[::-1]


def improve(space: RankSpace, ranks: Ranks, gains: NDArray[np.float64]) -> Ranks:
    """Returns a vector whose sum of gains no :func:`moves` makes larger.

    Args:
        space: The slots, choices and budget.
        ranks: Where to start; of the space.
        gains: (L, C) what each choice is worth in each slot.
    """
    padded = np.concatenate([gains, np.zeros((1, len(space.choices)))])  # the last row: no slot
    least = 1e-12 * float(np.abs(gains).max(initial=0.0))
    while True:
        up, down = moves(space, ranks)
        at = np.append(choice_indices(space, ranks), 0)
        change = padded[up, np.minimum(at[up] + 1, len(space.choices) - 1)] - padded[up, at[up]]
        change += padded[down, np.maximum(at[down] - 1, 0)] - padded[down, at[down]]
        best = int(np.argmax(change)) if len(change) else -1
        if best < 0 or change[best] <= least:
            return ranks
        ranks = moved(space, ranks, int(up[best]), int(down[best]))


def moves(space: RankSpace, ranks: Ranks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns every affordable step of one slot to its next larger rank, alone or paid for by one slot's step down.

    Returns:
        (M,) the slots that go up and (M,) those that go down; -1: none does.
    """
    costs, at = choice_costs(space), choice_indices(space, ranks)
    slots = np.arange(len(at))
    above = np.minimum(at + 1, len(space.choices) - 1)
    can_rise = (at + 1 < len(space.choices)) & choice_allowed(space)[slots, above]
    rise = costs[slots, above] - costs[slots, at]
    saved = np.append(costs[slots, at] - costs[slots, np.maximum(at - 1, 0)], 0)
    can_fall = np.append(at > 0, True)
    left = space.budget - space.cost(ranks)
    possible = can_rise[:, None] & can_fall[None, :] & (rise[:, None] <= left + saved[None, :])
    possible[slots, slots] = False
    up, down = np.nonzero(possible)
    return up, np.where(down == len(slots), -1, down)


def moved(space: RankSpace, ranks: Ranks, up: int, down: int) -> Ranks:
    """Returns a vector with one slot a step higher and, unless ``down`` is -1, another a step lower."""
    places = {rank: place for place, rank in enumerate(space.choices)}
    changed = list(ranks)
    changed[up] = space.choices[places[ranks[up]] + 1]
    if down >= 0:
        changed[down] = space.choices[places[ranks[down]] - 1]
    return tuple(changed)


def choice_costs(space: RankSpace) -> NDArray[np.int64]:
    """Returns (L, C) the trainable parameters of every choice in every slot."""
    return np.outer([slot.parameters_per_rank for slot in space.slots], space.choices)


def choice_allowed(space: RankSpace) -> NDArray[np.bool_]:
    """Returns (L, C) whether a slot can hold a choice; the smallest it always can."""
    return np.array(space.choices)[None, :] <= np.array([slot.limit for slot in space.slots])[:, None]


def choice_indices(space: RankSpace, ranks: Ranks) -> NDArray[np.int64]:
    """Returns (L,) the place of every rank among the choices."""
    return np.searchsorted(space.choices, ranks)


def nearest(space: RankSpace, wanted: Sequence[float]) -> Ranks:
    """Returns the vector under the budget whose ranks are nearest to the wanted ones, by the sum of squares of the differences."""
    difference = np.array(space.choices, dtype=float)[None, :] - np.array(wanted, dtype=float)[:, None]
    return fill(space, -(difference**2))


def random_vectors(space: RankSpace, count: int, taken: Set[Ranks], generator: np.random.Generator) -> list[Ranks]:
    """Returns up to ``count`` vectors under the budget, not among the taken ones: each is the best for worths drawn independently.

    Many leave some of the budget. Small ranks are where gains are steep, and a performance model learns more from vectors that have
    them than from as many that all spend the whole budget (planted, 24 layers: 0.97 of the attainable gain against 0.93).
    """
    found: dict[Ranks, None] = {}
    for _ in range(4 * count):  # a small space may not have as many
        if len(found) == count:
            break
        ranks = fill(space, generator.standard_normal((len(space.slots), len(space.choices))), rough=True)
        if ranks not in taken:
            found[ranks] = None
    return list(found)


def proportional_to(space: RankSpace, weights: NDArray[np.float64]) -> Ranks:
    """Returns the vector that spends the budget and whose ranks are as nearly proportional to the weights as the choices allow.

    Args:
        space: The slots, choices and budget.
        weights: (L,) not negative; all zero: every slot counts the same.
    """
    smallest, largest = space.choices[0], space.choices[-1]
    weights = weights if weights.any() else np.ones_like(weights)
    prices = np.array([slot.parameters_per_rank for slot in space.slots], dtype=float)
    limits = np.minimum(largest, [slot.limit for slot in space.slots])

    def at(scale: float) -> NDArray[np.float64]:
        return np.clip(scale * weights, smallest, limits)

    low, high = 0.0, float(largest) / float(weights[weights > 0].min())
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(at(middle) @ prices) <= space.budget else (low, middle)
    return nearest(space, at(low).tolist())
