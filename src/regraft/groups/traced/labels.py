"""Labels of channels, and the components of channels that must be removed together.

Every index of every parameter axis gets a *label*, an integer. Each element of an activation has the label of its channel. Tracing a
computation gives pairs of labels that can only be removed together; the connected components of these pairs are the removable units.
Grouped-query attention copies the channels of keys and values. Each copy gets a new label and a *copy* pair with the original. With copy
pairs, one component is a key-value head with all its query heads; without them, it is a single query head.
"""
# pyright: standard
# (SciPy has no types)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Labels = npt.NDArray[np.int64]
"""Labels of any shape; 0 where an element belongs to no channel."""


@dataclass(frozen=True)
class AxisLabels:
    """The labels of one axis of one parameter: ``first, first + 1, ...``.

    Attributes:
        parameter: Full name of the parameter.
        axis: Axis of the parameter's tensor.
        first: Label of index 0.
        size: Length of the axis.
    """

    parameter: str
    axis: int
    first: int
    size: int

    @property
    def labels(self) -> Labels:
        """Labels of all indices, (size,)."""
        return np.arange(self.first, self.first + self.size, dtype=np.int64)


class LabelSpace:
    """All labels of one traced graph, with the pairs that belong together."""

    def __init__(self) -> None:
        self.axes: dict[tuple[str, int], AxisLabels] = {}
        self.attended: list[Labels] = []
        self._next = 1
        self._pairs: list[Labels] = []
        self._copies: list[Labels] = []
        self._shared: list[tuple[Labels, Labels]] = []

    def axis(self, parameter: str, axis: int, size: int) -> AxisLabels:
        """Returns the labels of a parameter's axis, the same ones at every call."""
        key = (parameter, axis)
        if key not in self.axes:
            self.axes[key] = AxisLabels(parameter, axis, self._take(size), size)
        return self.axes[key]

    def join(self, first: Labels, second: Labels) -> None:
        """Joins the labels of two arrays of one shape, element by element, where both elements have one."""
        pairs = _distinct(first, second)
        if pairs.shape[1]:
            self._pairs.append(pairs)

    def join_parameter(self, parameter: Labels, partner: Labels) -> None:
        """Joins a parameter's labels to the labels that it is combined with, unless the parameter serves several channels at once.

        A norm inside a head multiplies every head by the same weights; these weights belong to no single head.
        """
        pairs = _distinct(parameter, partner)
        if pairs.shape[1]:
            self._shared.append((pairs[0], pairs[1]))

    def join_all(self, groups: Labels) -> Labels:
        """Joins all labels of each row, (rows, n); returns one label of each row, (rows,), or 0 for a row without labels."""
        chosen = groups.max(axis=1)
        self.join(groups, np.broadcast_to(chosen[:, None], groups.shape))
        return chosen

    def copies(self, labels: Labels, ordinal: Labels) -> Labels:
        """Returns labels for copies: one for each distinct pair of an original label and a copy number."""
        keys = labels * (int(ordinal.max()) + 1) + ordinal
        distinct, where = np.unique(np.where(labels > 0, keys, 0), return_inverse=True)
        fresh = self._take(len(distinct)) + np.arange(len(distinct), dtype=np.int64)
        copied = np.where(labels > 0, fresh[where.reshape(labels.shape)], 0)
        self._copies.append(_distinct(labels, copied))
        return copied

    def components(self, *, with_copies: bool) -> Labels:
        """Returns the component of every label, (labels,).

        A parameter that serves several channels joins none of them. Whether it serves several is decided on the components without
        copies, so that the result does not depend on the number of key-value heads. A channel whose copies all serve one component, such
        as a gate that multiplies all channels of a head, belongs to it also without copy pairs.
        """
        pairs = [*self._pairs, *self._owned()]
        return self._connect(pairs + (self._copies if with_copies else self._gathered(pairs)))

    def _gathered(self, pairs: list[Labels]) -> list[Labels]:
        """Returns the copy pairs of the channels whose copies are all in one component."""
        if not self._copies:
            return []
        original, copy = np.concatenate(self._copies, axis=1)
        component = self._connect(pairs)[copy]
        served = np.unique(np.stack([original, component]), axis=1)[0]
        alone = np.bincount(served, minlength=self._next)[original] == 1
        return [np.stack([original[alone], copy[alone]])]

    def _owned(self) -> list[Labels]:
        """Returns the pairs of parameters that serve one channel only."""
        if not self._shared:
            return []
        parameter, partner = (np.concatenate(part) for part in zip(*self._shared, strict=True))
        component = self._connect(self._pairs)[partner]
        served = np.unique(np.stack([parameter, component]), axis=1)[0]
        own = np.bincount(served, minlength=self._next)[parameter] == 1
        return [np.stack([parameter[own], partner[own]])]

    def _connect(self, pairs: list[Labels]) -> Labels:
        if not pairs:
            return np.arange(self._next, dtype=np.int64)
        first, second = np.concatenate(pairs, axis=1)
        graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(self._next, self._next))
        return connected_components(graph, directed=False)[1].astype(np.int64)

    def _take(self, count: int) -> int:
        first = self._next
        self._next += count
        return first


def _distinct(first: Labels, second: Labels) -> Labels:
    """Returns the distinct pairs of labels of two arrays of one shape, (2, pairs), without pairs of equal or missing labels."""
    first, second = first.reshape(-1), second.reshape(-1)
    keep = (first > 0) & (second > 0) & (first != second)
    if not keep.any():
        return np.empty((2, 0), dtype=np.int64)
    first, second = first[keep], second[keep]
    keys = np.unique(first * (int(second.max()) + 1) + second)
    return np.stack(np.divmod(keys, int(second.max()) + 1))
