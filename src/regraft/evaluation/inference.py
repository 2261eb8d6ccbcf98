"""What every measurement needs of a model: its mode, its vocabulary, and where it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout and the like off, and back on for the modules that had it on; no gradients are recorded."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: a model may keep a buffer made here, and be trained later
            yield
    finally:
        for module in training:
            module.training = True


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns where a model reads its token ids."""
    return _embedding(model).device


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns how many token ids a model knows: the rows of its embedding."""
    return _embedding(model).shape[0]


def _embedding(model: PreTrainedModel) -> Tensor:
    """Returns the embedding's weight, shape ``(vocabulary, hidden)``."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight
