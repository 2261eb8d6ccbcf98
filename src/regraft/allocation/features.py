"""What is known of the slots before any recovery, by name, and how allocators read it.

A plain feature is one number for each slot: ``share_pruned`` (of the slot's parameters), ``importance_removed`` (sum over the units that
went). A curve is one number for each slot and rank, named ``gradient_energy@8``: what the first eight directions bring together. It
never falls with the rank, and its unit is the measure's own.
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
        PlanError: The slots do not have it, or it is not finite or negative.
    """
    _check(space, name)
    values = np.array([slot.features[name] for slot in space.slots])
    if not (np.isfinite(values) & (values >= 0)).all():
        raise PlanError(f"feature '{name}' of the slots is negative or not finite; measure it again in float32")
    return values


def curve(space: RankSpace, name: str) -> NDArray[np.float64]:
    """Returns a curve of every slot at every choice, (L, C); where a slot cannot hold a choice, what its largest brings.

    Raises:
        PlanError: The slots do not have it, or it is not finite or negative.
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
    """Returns what a performance model sees of the slots: (L,) by name, each of mean 0 and standard deviation 1 over the slots.

    Positive features are taken as logarithms first, for their scale is arbitrary and their range wide. A curve gives two: its value at
    the largest choice, and under ``<name>:head`` the share of it that the smallest choice has already. A feature that is the same in
    every slot tells nothing and becomes zeros. ``depth`` is the place of the slot's layer.
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
        raise PlanError(f"the slots have no feature '{name}' (they have: {known}); measure it first, or choose another --method")
