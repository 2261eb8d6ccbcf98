"""Values of the interpreter: for each tensor the channels of its elements, or a known value, or only a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from regraft.groups.traced.labels import AxisLabels


@dataclass(frozen=True)
class Matrix:
    """A parameter of two or more axes, perhaps transposed; it has labels but no values.

    Attributes:
        axes: Labels of the axes, in their present order.
    """

    axes: tuple[AxisLabels, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True)
class Channels:
    """A tensor whose elements belong to channels.

    Attributes:
        labels: int64, of the tensor's shape; 0 for an element that belongs to no channel.
        parameter: Name of the parameter, if the tensor is a parameter, perhaps reshaped; None for an activation.
        squared: Whether the tensor is the square of one with channels; an RMS norm divides by the root of its mean.
        derived: Whether each element was computed from several channels, as in a norm; its label is that of one of them.
    """

    labels: Tensor
    parameter: str | None = None
    squared: bool = False
    derived: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.labels.shape)


@dataclass(frozen=True)
class Plain:
    """A tensor without channels: positions, masks, constants.

    Attributes:
        shape: Shape of the tensor.
        known: Value on the CPU, if it depends only on constants.
    """

    shape: tuple[int, ...]
    known: Tensor | None = None


Value = Matrix | Channels | Plain


@dataclass(frozen=True)
class Operands:
    """The tensors among the arguments of one call, by kind, each kind in order.

    Attributes:
        matrices: Weight matrices.
        channels: Tensors with channels.
        plains: Tensors without.
    """

    matrices: list[Matrix]
    channels: list[Channels]
    plains: list[Plain]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each operand."""
        return [value.shape for value in (*self.matrices, *self.channels, *self.plains)]


def operands_in(arguments: Any) -> Operands:
    """Returns the values among the arguments of a call, also inside lists and mappings."""
    found = Operands([], [], [])
    for leaf in tree_leaves(arguments):
        match leaf:
            case Matrix():
                found.matrices.append(leaf)
            case Channels():
                found.channels.append(leaf)
            case Plain():
                found.plains.append(leaf)
            case _:  # a number, a name, a dtype
                pass
    return found
