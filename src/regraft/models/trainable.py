"""Which parameters of a model gradients are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def only_these_train(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Asks for the gradients of these parameters alone, in evaluation mode, and puts everything back afterwards.

    Args:
        model: Whose other parameters ask for none meanwhile.
        parameters: Of that model.
    """
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        model.train(training)
