"""The best rank vector under the budget for given gains of each rank in each slot, and the moves between neighbouring vectors.

Rank vectors are not enumerated: the sum of gains is maximised by dynamic programming over the slots (a multiple-choice knapsack, like
:mod:`regraft.selection.knapsack` for widths).
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.contract import Ranks
from regraft.plans import RankSpace

# Costs are counted in steps of their greatest common divisor. If the table of all slots would exceed this many entries, and the number of
# steps the least number below, costs are rounded up to a coarser grid.
_ENTRIES = 400_000
_LEAST_STEPS = 2048
_ROUGH_STEPS = 512


def fill(space: RankSpace, gains: NDArray[np.float64], *, rough: bool = False) -> Ranks:
    """Returns the rank vector with the largest sum of gains under the budget.

    The result is exact if the budget is few enough multiples of the greatest common divisor of all costs (tens of thousands for ten
    slots). Otherwise costs are rounded up to a coarser grid, so that the budget holds, and the rest of the budget is spent by upgrades and
    swaps.

    Args:
        space: The slots, choices and budget.
        gains: (L, C) gain of each choice in each slot, in any unit; neither monotonic nor concave gains are required.
        rough: Whether to use a coarse grid in any case, which is many times faster; for gains that are drawn at random.
    """
    assert gains.shape == (len(space.slots), len(space.choices))
    costs = choice_costs(space)
    floor = costs[:, 0].sum()
    extra = costs - costs[:, :1]  # every slot has at least the smallest rank, so only the cost above it is distributed
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
    """Returns the choice index of every slot for the largest sum of gains with a sum of weights of at most ``capacity``.

    Args:
        gains: (L, C), minus infinity for a choice that is not allowed; the first choice is always allowed.
        weights: (L, C) whole numbers, zero in the first column.
        capacity: Largest sum of weights, a whole number.
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
    """Applies the best of the :func:`moves` until none increases the sum of gains; returns the last vector.

    Args:
        space: The slots, choices and budget.
        ranks: A vector of the space to start from.
        gains: (L, C) gain of each choice in each slot.
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
    """Returns every affordable move: one slot goes to its next larger rank, and perhaps another slot one step down to pay for it.

    Returns:
        (M,) the slots that go up and (M,) the slots that go down, with -1 for none.
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
    """Returns the trainable parameters of every choice in every slot, (L, C)."""
    return np.outer([slot.parameters_per_rank for slot in space.slots], space.choices)


def choice_allowed(space: RankSpace) -> NDArray[np.bool_]:
    """Returns whether each choice is within each slot's limit, (L, C); the smallest choice always is."""
    return np.array(space.choices)[None, :] <= np.array([slot.limit for slot in space.slots])[:, None]


def choice_indices(space: RankSpace, ranks: Ranks) -> NDArray[np.int64]:
    """Returns the index of every rank among the choices, (L,)."""
    return np.searchsorted(space.choices, ranks)


def nearest(space: RankSpace, wanted: Sequence[float]) -> Ranks:
    """Returns the vector under the budget with the least sum of squared differences from the wanted ranks."""
    difference = np.array(space.choices, dtype=float)[None, :] - np.array(wanted, dtype=float)[:, None]
    return fill(space, -(difference**2))


def random_vectors(space: RankSpace, count: int, taken: Set[Ranks], generator: np.random.Generator) -> list[Ranks]:
    """Returns up to ``count`` vectors under the budget that are not taken, each the best one for independently drawn gains.

    Many of them do not spend all of the budget. Gains are steep at small ranks, so that a performance model learns more from such vectors
    than from vectors that spend the full budget (planted problem, 24 layers: 0.97 of the attainable gain against 0.93).
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
    """Returns the vector that spends the budget with ranks as close to proportional to the weights as the choices allow.

    Args:
        space: The slots, choices and budget.
        weights: (L,) weights, not negative; if all are zero, every slot has the same weight.
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
