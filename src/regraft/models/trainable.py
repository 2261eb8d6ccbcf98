"""Modes of a model for a while: evaluation without gradients, gradients of chosen parameters alone, and other forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients; at the end, restores the training mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # not inference mode, because a model may keep a buffer made here and be trained later
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def only_these_train(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Enables the gradients of only these parameters, in evaluation mode, inside the block; restores both at the end.

    Args:
        model: The model, whose other parameters get no gradients.
        parameters: Parameters of the model.
    """
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the forward passes of modules inside the block; at the end, each module has the one that it had before.

    Args:
        forwards: Module to the function that is called in place of its ``forward``, with the same arguments.
    """
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
