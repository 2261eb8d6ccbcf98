"""Basics of every measurement: vocabulary size, and the device of the inputs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device on which a model expects its token ids."""
    return _embedding(model).device


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns the number of token ids of a model: the rows of its embedding."""
    return _embedding(model).shape[0]


def _embedding(model: PreTrainedModel) -> Tensor:
    """Returns the embedding's weight, shape ``(vocabulary, hidden)``."""
    return cast(Tensor, model.get_input_embeddings().weight)
