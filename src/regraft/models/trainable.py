"""Restriction of gradients to some parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def only_these_train(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Enables the gradients of only these parameters, in evaluation mode, inside the block; restores both at the end.

    Args:
        model: The model, whose other parameters get no gradients.
        parameters: Parameters of the model.
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
