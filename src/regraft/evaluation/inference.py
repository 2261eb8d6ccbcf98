"""Basics of every measurement: evaluation mode, vocabulary size, and the device of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device on which a model expects its token ids."""
    return _embedding(model).device


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns the number of token ids of a model: the rows of its embedding."""
    return _embedding(model).shape[0]


def _embedding(model: PreTrainedModel) -> Tensor:
    """Returns the embedding's weight, shape ``(vocabulary, hidden)``."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
