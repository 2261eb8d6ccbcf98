"""Coupled weights: which axes of which parameters are cut together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["out", "in"]
GroupKind = Literal["ffn", "heads", "query_heads", "residual", "attention", "mlp", "layer"]
WHOLE: tuple[GroupKind, ...] = ("layer", "attention", "mlp")  # kinds of groups of one unit, which stays or goes


@dataclass(frozen=True)
class Member:
    """One axis of one parameter, cut into the units of a group.

    Unit ``u`` owns the indices ``offset + k*stride + u*size + [0, size)`` for ``k`` in ``range(repeats)``. A plain projection
    has ``repeats = 1``; a fused one (gate and up in one matrix) appears as several members with different offsets; query heads
    that are removed evenly from every key-value group use ``repeats`` and ``stride``.

    Attributes:
        parameter: Full name of the parameter, such as ``model.layers.0.mlp.up_proj.weight``.
        axis: Axis of the parameter's tensor along which units lie.
        side: ``"out"`` when the axis produces the unit's channels, ``"in"`` when it reads them.
        offset: First index of unit 0.
        size: Consecutive indices of one unit.
        repeats: How many such blocks one unit owns.
        stride: Distance between the blocks of one unit.
    """

    parameter: str
    axis: int
    side: Side
    offset: int = 0
    size: int = 1
    repeats: int = 1
    stride: int = 0

    def indices(self, unit: int) -> Iterator[int]:
        """Yields the indices along ``axis`` that unit ``unit`` owns."""
        for block in range(self.repeats):
            start = self.offset + block * self.stride + unit * self.size
            yield from range(start, start + self.size)

    @property
    def width(self) -> int:
        """How many indices one unit owns."""
        return self.size * self.repeats


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each with everything that must go with it.

    Attributes:
        name: Unique, stable: ``layers.3.ffn``.
        kind: What a unit is.
        layer: Index of the decoder layer, or None for the residual width.
        units: How many units there are.
        members: The coupled axes.
        unit_parameters: How many parameters go with one unit.
    """

    name: str
    kind: GroupKind
    layer: int | None
    units: int
    members: tuple[Member, ...]
    unit_parameters: int


@dataclass(frozen=True)
class Groups:
    """Everything in one model that can be pruned.

    Attributes:
        fingerprint: Of the model the groups were found in.
        family: ``model_type`` of its config.
        layers: How many decoder layers it has.
        parameters: How many parameters it has, tied ones counted once.
        groups: In the order of the layers.
        shapes: Of every parameter, by name; what overlapping cuts leave is counted from them.
    """

    fingerprint: str
    family: str
    layers: int
    parameters: int
    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def named(self) -> dict[str, Group]:
        """Returns the groups by name."""
        return {group.name: group for group in self.groups}

    def of(self, kind: GroupKind) -> tuple[Group, ...]:
        """Returns the groups of one kind, in the order of the layers."""
        return tuple(group for group in self.groups if group.kind == kind)
