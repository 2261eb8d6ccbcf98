"""The loss of a causal language model over fixed batches, each predicted token counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from regraft.data.instructions import IGNORED


def predicted_tokens(labels: Tensor) -> int:
    """Returns how many tokens of a batch are predicted: those with a label that are not first in their row.

    Args:
        labels: ``(batch, tokens)`` int64, ``-100`` where nothing is predicted.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def mean_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> float:
    """Returns the mean negative log-likelihood of a predicted token in nats, without dropout and without gradients.

    Batches of unequal numbers of predicted tokens weigh by that number, unlike a mean of the means of batches.

    Args:
        model: Takes ``input_ids``, ``attention_mask`` and ``labels`` and returns an output with ``loss``; its mode (training or
            not) is put back afterwards.
        batches: Each with at least one predicted token.
        device: Where the model is.
    """
    total_nats, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                count = predicted_tokens(batch["labels"])
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
                total_nats += float(output.loss) * count
                tokens += count
    finally:
        model.train(was_training)
    return total_nats / tokens
