"""Steps of gradient descent, heavy ball and Adam on a list of tensors, each with its own step size and decay.

torch.optim has the same rules, but its classes cost half a millisecond a step, more than the step of a small factorization itself, and
seconds when first imported. The tests compare these classes with torch.optim.

References:
    [POL64] Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    [KIN15] Kingma, Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

ADAM_EPSILON = 1e-12
"""Added to Adam's denominator. torch's 1e-8 is as large as the first gradients of a start at scale 1e-3, and would damp them."""


class Moved(NamedTuple):
    """A tensor to update in place, with its step size and decay."""

    tensor: Tensor
    step_size: float
    weight_decay: float


class Update(ABC):
    """An update rule that moves tensors along their gradients, in place."""

    @abstractmethod
    def apply(self, gradients: Sequence[Tensor]) -> None:
        """Makes one step. The gradients are in the order of the tensors, and may be overwritten."""


@final
class HeavyBall(Update):
    """Heavy ball: v <- momentum v + gradient + decay W, W <- W - step v ([POL64]); gradient descent at momentum 0.

    Args:
        moved: The tensors to update.
        momentum: Momentum, in [0, 1).
    """

    def __init__(self, moved: Sequence[Moved], momentum: float = 0.0) -> None:
        self._moved, self._momentum = moved, momentum
        self._velocities = [torch.zeros_like(each.tensor) for each in moved] if momentum else []

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """See :meth:`Update.apply`."""
        for index, (each, gradient) in enumerate(zip(self._moved, gradients, strict=True)):
            direction = gradient.add_(each.tensor, alpha=each.weight_decay) if each.weight_decay else gradient
            if self._momentum:
                direction = self._velocities[index].mul_(self._momentum).add_(direction)
            each.tensor.sub_(direction, alpha=each.step_size)


@final
class Adam(Update):
    """Adam with the decay added to the gradient ([KIN15]), epsilon 1e-12.

    Args:
        moved: The tensors to update.
        first: Decay of the first moment.
        second: Decay of the second moment.
    """

    def __init__(self, moved: Sequence[Moved], first: float = 0.9, second: float = 0.999) -> None:
        self._moved, self._first, self._second = moved, first, second
        self._means = [torch.zeros_like(each.tensor) for each in moved]
        self._squares = [torch.zeros_like(each.tensor) for each in moved]
        self._steps = 0

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """See :meth:`Update.apply`."""
        self._steps += 1
        scale_mean, scale_square = 1 - self._first**self._steps, 1 - self._second**self._steps
        for each, gradient, mean, square in zip(self._moved, gradients, self._means, self._squares, strict=True):
            direction = gradient.add_(each.tensor, alpha=each.weight_decay) if each.weight_decay else gradient
            mean.mul_(self._first).add_(direction, alpha=1 - self._first)
            square.mul_(self._second).addcmul_(direction, direction, value=1 - self._second)
            root = (square / scale_square).sqrt_().add_(ADAM_EPSILON)
            each.tensor.addcdiv_(mean, root, value=-each.step_size / scale_mean)
