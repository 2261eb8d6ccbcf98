"""Units of groups, from components of labels: the indices that each unit owns on each parameter axis."""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from regraft.groups.traced.labels import AxisLabels, Labels
from regraft.plans import GroupKind, Member, Side


@dataclass(frozen=True)
class Units:
    """The units of one group: components that own equally many indices of the same axes of the same parameters.

    Attributes:
        components: Component of each unit, in the order of the first axis.
        indices: (parameter, axis) to the indices that each unit owns, (units, width), ascending in each row.
    """

    components: Labels
    indices: dict[tuple[str, int], Labels]

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.components)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(dict.fromkeys(name for name, _ in self.indices))

    def narrowed(self, keep: Callable[[str], bool]) -> Units:
        """Returns the units without the parameters that ``keep`` refuses."""
        return Units(self.components, {key: value for key, value in self.indices.items() if keep(key[0])})


def find_units(axes: Sequence[AxisLabels], component: Labels) -> list[Units]:
    """Collects components that own the same axes into sets of units.

    Args:
        axes: The axes to search, in the order in which members are listed.
        component: Component of every label.

    Returns:
        Every set of components that own the same number of indices of the same axes. Components with a single axis are left out, because
        they couple nothing.
    """
    count = int(component.max()) + 1
    signature = np.zeros(count, dtype=np.int64)
    coupled = np.zeros(count, dtype=np.int64)
    for axis in axes:
        touched, owned = np.unique(component[axis.labels], return_counts=True)
        keys = signature[touched] * (axis.size + 1) + owned
        signature[touched] = np.unique(keys, return_inverse=True)[1] + int(signature.max()) + 1
        coupled[touched] += 1
    found: list[Units] = []
    for kind in np.unique(signature[coupled > 1]):
        members = np.flatnonzero((signature == kind) & (coupled > 1))
        indices = {key: rows for key, rows in _owned(axes, component, members)}
        first = next(iter(indices.values()))[:, 0]
        order = np.argsort(first, kind="stable")
        found.append(Units(members[order], {key: rows[order] for key, rows in indices.items()}))
    return sorted(found, key=lambda units: [position_of(axes, key) for key in units.indices])


def position_of(axes: Sequence[AxisLabels], key: tuple[str, int]) -> int:
    """Returns the position of an axis in a list of axes."""
    return next(index for index, axis in enumerate(axes) if (axis.parameter, axis.axis) == key)


def _owned(axes: Sequence[AxisLabels], component: Labels, members: Labels) -> Iterable[tuple[tuple[str, int], Labels]]:
    wanted = np.zeros(int(component.max()) + 1, dtype=bool)
    wanted[members] = True
    for axis in axes:
        own = component[axis.labels]
        places = np.flatnonzero(wanted[own])
        if len(places):
            order = np.argsort(own[places], kind="stable")
            yield (axis.parameter, axis.axis), places[order].reshape(len(members), -1)


class UnorderedError(Exception):
    """The indices of a parameter do not follow the pattern of :class:`~regraft.plans.Member`."""


def members_of(units: Units, sides: Mapping[tuple[str, int], Side], kind: GroupKind) -> tuple[Member, ...]:
    """Returns the members of a group: first those that write its channels, then those that read them.

    Raises:
        UnorderedError: A parameter has its channels in an order that cannot be cut; the message names it.
    """
    found: list[Member] = []
    for side in ("out", "in"):
        for (name, axis), indices in units.indices.items():
            if sides[name, axis] != side:
                continue
            blocks = _blocks(indices)
            if blocks is None:
                raise UnorderedError(f"the channels of '{name}' are not in an order that can be cut")
            found += _as_members(name, axis, side, blocks, evenly=kind == "query_heads")
    return tuple(found)


def _as_members(name: str, axis: int, side: Side, blocks: Sequence[tuple[int, int]], *, evenly: bool) -> list[Member]:
    """Returns one member for each block, or a single member with repeats for equal blocks at equal distances (query heads)."""
    offsets = [offset for offset, _ in blocks]
    sizes = {size for _, size in blocks}
    strides = {second - first for first, second in pairwise(offsets)}
    if evenly and len(blocks) > 1 and len(sizes) == 1 and len(strides) == 1:
        return [Member(name, axis, side, offsets[0], sizes.pop(), repeats=len(blocks), stride=strides.pop())]
    return [Member(name, axis, side, offset, size) for offset, size in blocks]


def _blocks(indices: Labels) -> list[tuple[int, int]] | None:
    """Returns offset and size of each run of indices of unit 0, or None if unit u does not own the same runs moved by u sizes."""
    steps = (np.diff(indices, axis=1) != 1).any(axis=0)
    starts = [0, *(np.flatnonzero(steps) + 1).tolist()]
    ends = [*starts[1:], indices.shape[1]]
    found: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        size = end - start
        offset = int(indices[0, start])
        expected = offset + size * np.arange(len(indices))
        if not np.array_equal(indices[:, start], expected):
            return None
        found.append((offset, size))
    return found
