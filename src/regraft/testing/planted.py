"""Rank spaces with planted concave gains, where the best rank vector is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.contract import Ranks
from regraft.plans import RankSlot, RankSpace, RankTrial

CHOICES = (2, 4, 6, 8)


def space_of(costs: Sequence[int], choices: Sequence[int] = CHOICES, uniform: int = 6, limits: Sequence[int] = ()) -> RankSpace:
    """Returns a space whose slots cost so much for each rank; its budget is what the uniform rank costs."""
    limits = limits or [choices[-1]] * len(costs)
    sides = enumerate(zip(costs, limits, strict=True))
    slots = tuple(RankSlot(f"layers.{index}", (f"layers.{index}.q",), index, cost, limit) for index, (cost, limit) in sides)
    return RankSpace("planted", "layer", slots, tuple(choices), uniform * sum(costs), uniform)


def all_vectors(space: RankSpace) -> list[Ranks]:
    """Returns every vector under the budget, by enumeration."""
    return [ranks for ranks in product(space.choices, repeat=len(space.slots)) if space.holds(ranks)]


class World:
    """Gains that add up: amplitude times r / (r + 5) in every slot, with features that tell something of the amplitudes."""

    def __init__(self, slots: int = 8, seed: int = 0, noise_nats: float = 0.001, total_nats: float = 0.2) -> None:
        draw = np.random.default_rng(seed)
        told, own = draw.standard_normal((2, slots))
        plain = space_of([int(cost) for cost in draw.integers(10, 21, slots)], (2, 4, 6, 8, 10, 12), 8)
        named = [
            RankSlot(slot.name, slot.modules, slot.layer, slot.parameters_per_rank, 12, {"share_pruned": float(np.exp(0.5 * value))})
            for slot, value in zip(plain.slots, told, strict=True)
        ]
        self.space = RankSpace("planted", "layer", tuple(named), plain.choices, plain.budget, 8)
        amplitude = np.exp(0.8 * told + 0.6 * own)
        ranks = np.array(plain.choices, dtype=np.float64)
        shape = ranks / (ranks + 5.0)
        self.table: NDArray[np.float64] = total_nats * amplitude[:, None] / amplitude.sum() * shape[None, :] / np.ptp(shape)
        self.noise_nats, self.draw = noise_nats, draw
        self.uniform: Ranks = (8,) * slots

    def gain(self, ranks: Ranks) -> float:
        """Returns what a vector gains over the uniform one, in nats."""
        at = np.searchsorted(self.space.choices, [ranks, self.uniform])
        slots = np.arange(len(ranks))
        return float(self.table[slots, at[0]].sum() - self.table[slots, at[1]].sum())

    def trial(self, ranks: Ranks, fidelity: float = 1.0, seed: int = 0, cost: float | None = None) -> RankTrial:
        """Returns one noisy measurement; short ones show a part of the gain, and every seed has a loss of its own."""
        loss = 3.0 + 0.1 * seed - fidelity**0.3 * self.gain(ranks) + self.noise_nats * float(self.draw.standard_normal())
        return RankTrial(ranks, loss, fidelity, fidelity if cost is None else cost, "recovery", seed)
