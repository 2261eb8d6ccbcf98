"""Values of pruning: scores of units, curves of damage against size, and the prune plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from regraft.errors import PlanError
from regraft.in_short import in_short

Shape = Literal["uniform", "per-layer"]


@dataclass(frozen=True)
class Scores:
    """Importance of each unit; units with higher scores are kept.

    Attributes:
        fingerprint: Fingerprint of the scored model.
        criterion: Name and settings of the criterion, such as ``taylor(order=first, reduce=sum)``.
        values: Group name to one score for each unit.
    """

    fingerprint: str
    criterion: str
    values: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            if not all(math.isfinite(value) for value in values):
                raise PlanError(
                    f"scores of {name} are not finite; the model or its gradients hold NaN or infinity: "
                    "use `dtype=float32`, or another criterion"
                )


@dataclass(frozen=True)
class Curve:
    """Damage to the model when one group keeps fewer units and all other groups are unchanged.

    Attributes:
        kept: Numbers of kept units, ascending; the last is the full number.
        damage_nats: Kullback-Leibler divergence from the dense model, in nats a token, for each number; the last is zero.
        cost: Cost of the group for each number: parameters, bytes or milliseconds.
    """

    kept: tuple[int, ...]
    damage_nats: tuple[float, ...]
    cost: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """Measured damage against size for every group that may be cut.

    Attributes:
        fingerprint: Fingerprint of the model.
        unit: Unit of the costs.
        fixed_cost: Cost of all parts of the model that are in no curve.
        values: Group name to curve.
    """

    fingerprint: str
    unit: Literal["parameters", "bytes", "milliseconds"]
    fixed_cost: float
    values: dict[str, Curve]


@dataclass(frozen=True)
class Cut:
    """The kept units of one group, ascending."""

    group: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Removed:
    """Record of the units removed from one group, stored for later stages that have only the pruned model.

    Attributes:
        units: Number of units before the cut.
        importance: Sum of the scores of the removed units, in the criterion's unit.
    """

    units: int
    importance: float


@dataclass(frozen=True, repr=False)
class PrunePlan:
    """The units to keep of each group that loses units; all other groups are unchanged.

    Attributes:
        fingerprint: Fingerprint of the model that the plan is for.
        criterion: Criterion that scored the units.
        selection: Method that chose the widths.
        shape: Whether every layer must end with the same widths.
        ratio: Requested share of all parameters to remove.
        align: Number of which all widths are multiples.
        parameters_before: Number of parameters of the model before the cut.
        parameters_after: Number of parameters of the model after the cut.
        cuts: One cut for each group that loses units.
        made_with: All that is needed to make the same weights again from the plan: the prune settings, the seed, and the SHA-256 of the
            calibration windows (None without text). Empty if it is not known.
        removed: Group name to its removal record, also for groups that lose nothing. Empty in plans of versions without this record.
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

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    @property
    def achieved(self) -> float:
        """Share of all parameters that the plan removes."""
        return 1.0 - self.parameters_after / self.parameters_before
