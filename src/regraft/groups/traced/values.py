"""What is known of a tensor while a computation is followed: the channels of its elements, or its value, or nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regraft.groups.traced.labels import AxisLabels


@dataclass(frozen=True)
class Matrix:
    """A parameter of two axes or more, or one that was turned round; never materialised.

    Attributes:
        axes: Labels of its axes, in their present order.
    """

    axes: tuple[AxisLabels, ...]


@dataclass(frozen=True)
class Channels:
    """A tensor whose elements belong to channels.

    Attributes:
        labels: int64, of the tensor's shape; 0 where an element belongs to no channel.
        parameter: Name of the parameter that this is, unchanged but for its shape; None for an activation.
        squared: Whether it is the square of such a tensor: its mean is what an RMS norm divides by.
        derived: Whether the elements are not channels but numbers computed from several, such as a norm's; the label is that of
            one of them.
    """

    labels: Tensor
    parameter: str | None = None
    squared: bool = False
    derived: bool = False


@dataclass(frozen=True)
class Plain:
    """A tensor without channels: positions, masks, constants.

    Attributes:
        shape: Of the tensor.
        known: Its value on the CPU, where it follows from constants alone.
    """

    shape: tuple[int, ...]
    known: Tensor | None = None


Value = Matrix | Channels | Plain
