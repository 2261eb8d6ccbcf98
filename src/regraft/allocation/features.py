"""Features of slots: named properties that are known before any recovery, and their access by allocators.

A plain feature is one number for each slot, such as ``share_pruned`` (the pruned share of its parameters) or ``importance_removed`` (the
summed scores of its removed units). A curve is one number for each slot and rank, with names such as ``gradient_energy@8``: the total
over the first eight directions. It never falls with the rank. Each curve has its own unit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.fill import choice_allowed
from regraft.errors import PlanError
from regraft.plans import RankSpace

SHARE_PRUNED = "share_pruned"
IMPORTANCE_REMOVED = "importance_removed"
GRADIENT_ENERGY = "gradient_energy"
EVA = "eva"
ADALORA = "adalora"


def plain(space: RankSpace, name: str) -> NDArray[np.float64]:
    """Returns one feature of every slot, (L,).

    Raises:
        PlanError: The slots lack the feature, or a value is negative or not finite.
    """
    _check(space, name)
    values = np.array([slot.features[name] for slot in space.slots])
    if not (np.isfinite(values) & (values >= 0)).all():
        raise PlanError(f"feature '{name}' of the slots is negative or not finite; measure it again in float32")
    return values


def curve(space: RankSpace, name: str) -> NDArray[np.float64]:
    """Returns a curve of every slot at every choice, (L, C). A choice above a slot's limit has the value of the largest allowed choice.

    Raises:
        PlanError: The slots lack the feature, or a value is negative or not finite.
    """
    values = np.stack([plain(space, f"{name}@{rank}") for rank in space.choices], axis=1)
    return np.maximum.accumulate(np.where(choice_allowed(space), values, 0.0), axis=1)


def has_plain(space: RankSpace, name: str) -> bool:
    """Returns whether the slots have a plain feature."""
    return name in space.slots[0].features


def has_curve(space: RankSpace, name: str) -> bool:
    """Returns whether the slots have a curve at every choice."""
    return all(has_plain(space, f"{name}@{rank}") for rank in space.choices)


def standardized(space: RankSpace) -> dict[str, NDArray[np.float64]]:
    """Returns the slots' inputs to a performance model: (L,) by name, each with mean 0 and standard deviation 1 over the slots.

    Positive features are replaced by their logarithms first, because their scale is arbitrary and their range wide. A curve gives two
    inputs: its value at the largest choice and, under ``<name>:head``, the share of that value at the smallest choice. A feature that is
    equal in every slot becomes zeros. ``depth`` is the index of the slot's layer.
    """
    found = {"depth": np.array([float(slot.layer) for slot in space.slots])}
    names = sorted(space.slots[0].features)
    for name in dict.fromkeys(name.split("@")[0] for name in names):
        if has_plain(space, name):
            found[name] = plain(space, name)
        elif has_curve(space, name):
            values = curve(space, name)
            found[name] = values[:, -1]
            found[f"{name}:head"] = values[:, 0] / np.where(values[:, -1] > 0, values[:, -1], 1.0)
    return {name: _standard(values) for name, values in found.items()}


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled = np.log(values) if (values > 0).all() else values
    deviation = float(scaled.std())
    return (scaled - scaled.mean()) / deviation if deviation > 1e-9 * (1.0 + float(np.abs(scaled).max())) else np.zeros_like(scaled)


def _check(space: RankSpace, name: str) -> None:
    if any(name not in slot.features for slot in space.slots):
        known = ", ".join(sorted(space.slots[0].features)) or "none"
        raise PlanError(f"the slots have no feature '{name}' (they have: {known}); measure it first, or choose another `method`")
