"""Groups of coupled weights: the axes of parameters that must be cut together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from regraft.in_short import in_short

Side = Literal["out", "in"]
GroupKind = Literal[
    "ffn", "heads", "query_heads", "mixer_heads", "residual", "attention", "mlp", "layer", "vocabulary", "experts", "expert_ffn"
]
WHOLE: tuple[GroupKind, ...] = ("layer", "attention", "mlp")  # kinds of groups with one unit, which is kept or removed


@dataclass(frozen=True)
class Member:
    """One axis of one parameter, cut into the units of a group.

    Unit ``u`` owns the indices ``offset + k*stride + u*size + [0, size)`` for ``k`` in ``range(repeats)``. A plain projection
    has ``repeats = 1``; a fused one (gate and up in one matrix) appears as several members with different offsets; query heads
    that are removed evenly from every key-value group use ``repeats`` and ``stride``.

    Attributes:
        parameter: Full name of the parameter, such as ``model.layers.0.mlp.up_proj.weight``.
        axis: Axis of the parameter's tensor that holds the units.
        side: ``"out"`` when the parameter writes the units' channels along the axis, ``"in"`` when it reads them.
        offset: First index of unit 0.
        size: Number of consecutive indices in a block.
        repeats: Number of blocks that one unit owns.
        stride: Distance between the blocks of one unit.
        entry: Index on the first axis of a stack, in which alone the indices lie; None for the whole parameter.
    """

    parameter: str
    axis: int
    side: Side
    offset: int = 0
    size: int = 1
    repeats: int = 1
    stride: int = 0
    entry: int | None = None

    def indices(self, unit: int) -> Iterator[int]:
        """Yields the indices along ``axis`` that unit ``unit`` owns."""
        for block in range(self.repeats):
            start = self.offset + block * self.stride + unit * self.size
            yield from range(start, start + self.size)

    @property
    def width(self) -> int:
        """Number of indices that one unit owns."""
        return self.size * self.repeats


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each with all indices that must be removed with it.

    Attributes:
        name: Unique and stable name, such as ``layers.3.ffn``.
        kind: Kind of the units.
        layer: Index of the decoder layer, or None for the residual width.
        units: Number of units.
        members: The coupled axes.
        unit_parameters: Number of parameters that are removed with one unit.
    """

    name: str
    kind: GroupKind
    layer: int | None
    units: int
    members: tuple[Member, ...]
    unit_parameters: int

    @property
    def reader(self) -> Member:
        """The member that reads the channels of the group: the down or the output projection."""
        return next(member for member in self.members if member.side == "in")


@dataclass(frozen=True, repr=False)
class Groups:
    """All groups of a model that can be pruned.

    Attributes:
        fingerprint: Fingerprint of the model.
        family: ``model_type`` of the model's config.
        layers: Number of decoder layers.
        parameters: Number of parameters, tied ones counted once.
        groups: The groups, in the order of the layers.
        shapes: Parameter name to shape; needed to count the parameters that overlapping cuts leave.
    """

    fingerprint: str
    family: str
    layers: int
    parameters: int
    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    def named(self) -> dict[str, Group]:
        """Returns the groups by name."""
        return {group.name: group for group in self.groups}

    def holds_slice(self, member: Member) -> bool:
        """Returns whether a member of one unit is a slice of its parameter, such as what one layer owns of a table outside the layers."""
        shape = self.shapes.get(member.parameter)
        return shape is not None and member.width < shape[member.axis]

    def of(self, kind: GroupKind) -> tuple[Group, ...]:
        """Returns the groups of one kind, in the order of the layers."""
        return tuple(group for group in self.groups if group.kind == kind)
