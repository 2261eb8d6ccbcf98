"""Pruning: scores of units, damage against size, and the plan that says which units stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from regraft.errors import PlanError

Shape = Literal["uniform", "per-layer"]


@dataclass(frozen=True)
class Scores:
    """How much each unit matters: higher is kept.

    Attributes:
        fingerprint: Of the model that was scored.
        criterion: Name and settings, such as ``taylor(order=first, reduce=sum)``.
        values: One number per unit for every group name.
    """

    fingerprint: str
    criterion: str
    values: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            if not all(math.isfinite(value) for value in values):
                raise PlanError(
                    f"scores of {name} are not finite; the model or its gradients hold NaN or infinity: "
                    "use --dtype float32, or another criterion"
                )


@dataclass(frozen=True)
class Curve:
    """What it does to the model to keep only so many units of one group, everything else whole.

    Attributes:
        kept: Numbers of units, ascending; the last is the whole group.
        damage_nats: Kullback-Leibler divergence to the dense model per token at each; the last is zero.
        cost: What the group costs at each: parameters, bytes or milliseconds.
    """

    kept: tuple[int, ...]
    damage_nats: tuple[float, ...]
    cost: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """Measured damage against size for every group that may be cut.

    Attributes:
        fingerprint: Of the model.
        unit: Of the costs.
        fixed_cost: Of everything that is not in a curve.
        values: Group name to curve.
    """

    fingerprint: str
    unit: Literal["parameters", "bytes", "milliseconds"]
    fixed_cost: float
    values: dict[str, Curve]


@dataclass(frozen=True)
class Cut:
    """What stays of one group: the kept units, ascending."""

    group: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Removed:
    """What a plan takes from one group, for those who have only the pruned model.

    Attributes:
        units: How many there were.
        importance: Sum of the scores of those that went, in the criterion's unit.
    """

    units: int
    importance: float


@dataclass(frozen=True)
class PrunePlan:
    """Which units of which groups stay; everything not named stays whole.

    Attributes:
        fingerprint: Of the model the plan is for.
        criterion: How units were scored.
        selection: How widths were chosen.
        shape: Whether every layer must end with the same widths.
        ratio: Share of all parameters that was asked for.
        align: Widths are multiples of this.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        cuts: One for each group that loses units.
        made_with: What it takes to go from the plan to the same bytes again: the prune settings, the seed, and the SHA-256 of the
            calibration windows (None without text). Empty where that is not known.
        removed: What goes of every group, by name; groups that stay whole too. Empty in plans from before it was recorded.
    """

    fingerprint: str
    criterion: str
    selection: str
    shape: Shape
    ratio: float
    align: int
    parameters_before: int
    parameters_after: int
    cuts: tuple[Cut, ...]
    made_with: Mapping[str, Any] = field(default_factory=dict[str, Any])
    removed: Mapping[str, Removed] = field(default_factory=dict[str, Removed])

    @property
    def achieved(self) -> float:
        """Share of all parameters that the plan removes."""
        return 1.0 - self.parameters_after / self.parameters_before
