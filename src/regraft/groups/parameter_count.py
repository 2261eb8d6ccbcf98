"""Exact count of the parameters that a model has left when groups lose units, also where groups overlap.

Two cuts may remove the same parameters (a head and a channel of the residual stream, a query head and its key-value group, a channel and
its layer); these are counted once. The count depends only on how many units each group loses, not on which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from regraft.plans import WHOLE, Group, Groups, Member

Amounts = Mapping[str, float]
"""Group name to number of kept units; a group that is not named keeps all. Fractions of a unit are counted in proportion."""


@dataclass
class _Axis:
    """The groups that shorten one axis of a parameter.

    Attributes:
        length: Full length of the axis.
        widths: Group name to the number of indices that one of its units owns.
        shared: Pair of groups to the number of indices that a unit of the one and a unit of the other both own.
    """

    length: int
    widths: dict[str, int] = field(default_factory=dict[str, int])
    shared: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])


@dataclass
class _Parameter:
    whole: list[str] = field(default_factory=list[str])
    axes: dict[int, _Axis] = field(default_factory=dict[int, _Axis])
    rest: int = 1  # product of the lengths of the axes that no group shortens


class Ledger:
    """A count of the parameters that a model has left.

    Args:
        groups: Groups of the model. A group without members, or with parameters of unknown shape, counts as disjoint from all others.
        names: The groups that may lose units.
    """

    def __init__(self, groups: Groups, names: Iterable[str]) -> None:
        self._total = groups.parameters
        named = groups.named()
        self._groups = {name: named[name] for name in names}
        self._parameters: dict[str, _Parameter] = {}
        self._touched: dict[str, tuple[str, ...]] = {}
        for name, group in self._groups.items():
            known = bool(group.members) and all(member.parameter in groups.shapes for member in group.members)
            self._touched[name] = tuple(dict.fromkeys(member.parameter for member in group.members)) if known else ()
            if known:
                self._enter(group, groups.shapes)
        for name, parameter in self._parameters.items():
            shape = groups.shapes[name]
            parameter.rest = math.prod(length for axis, length in enumerate(shape) if axis not in parameter.axes)
        self._full = {name: math.prod(groups.shapes[name]) for name in self._parameters}

    def left(self, kept: Amounts) -> float:
        """Returns how many parameters the model has left; a whole number when ``kept`` has whole numbers."""
        return self._total + sum(self._change(name, kept) for name in self._parameters) - self._loose(self._groups, kept)

    def lost(self, name: str, kept: Amounts, to: float) -> float:
        """Returns how many parameters are lost when one group is cut from its units in ``kept`` down to ``to`` units."""
        group = self._groups[name]
        if not self._touched[name]:
            return (kept.get(name, group.units) - to) * group.unit_parameters
        after = {**kept, name: to}
        return sum(self._change(parameter, kept) - self._change(parameter, after) for parameter in self._touched[name])

    def _enter(self, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
        members: dict[tuple[str, int], list[Member]] = {}
        for member in group.members:
            parameter = self._parameters.setdefault(member.parameter, _Parameter())
            if group.kind in WHOLE and member.width == shapes[member.parameter][member.axis]:
                parameter.whole.append(group.name)
                continue
            parameter.axes.setdefault(member.axis, _Axis(shapes[member.parameter][member.axis]))
            members.setdefault((member.parameter, member.axis), []).append(member)
        for (name, index), here in members.items():
            axis = self._parameters[name].axes[index]
            mine = _owned(here)
            for other in axis.widths:
                others = [m for m in self._groups[other].members if (m.parameter, m.axis) == (name, index)]
                shared = len(mine & _owned(others))
                if shared:
                    axis.shared[other, group.name] = shared
            axis.widths[group.name] = sum(member.width for member in here)

    def _change(self, name: str, kept: Amounts) -> float:
        """Returns the change in a parameter's size against its full size: zero or negative."""
        parameter = self._parameters[name]
        size: float = parameter.rest
        for whole in parameter.whole:
            size *= kept.get(whole, 1)
        for axis in parameter.axes.values():
            size *= self._length(axis, kept)
        return size - self._full[name]

    def _length(self, axis: _Axis, kept: Amounts) -> float:
        gone = {name: self._groups[name].units - kept.get(name, self._groups[name].units) for name in axis.widths}
        lost = sum(axis.widths[name] * count for name, count in gone.items())
        return axis.length - lost + sum(gone[first] * gone[second] * count for (first, second), count in axis.shared.items())

    def _loose(self, groups: Mapping[str, Group], kept: Amounts) -> float:
        return sum(
            (group.units - kept.get(name, group.units)) * group.unit_parameters for name, group in groups.items() if not self._touched[name]
        )


def overlap(groups: Iterable[Group]) -> bool:
    """Returns whether any two of the groups share parameters, judged by their kinds."""
    kinds = {group.kind for group in groups}
    return any(pair <= kinds for pair in _OVERLAPPING)


_OVERLAPPING = (
    *({"residual", kind} for kind in ("heads", "query_heads", "mixer_heads", "ffn", *WHOLE)),
    *({"layer", kind} for kind in ("heads", "query_heads", "mixer_heads", "ffn", "attention", "mlp")),
    *({"attention", kind} for kind in ("heads", "query_heads")),
    {"mlp", "ffn"},
    {"heads", "query_heads"},
)


def _owned(members: Iterable[Member]) -> set[int]:
    """Returns the indices that the first unit owns."""
    return {index for member in members for index in member.indices(0)}
