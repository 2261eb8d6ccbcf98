"""The Kullback-Leibler divergence of changed predictions from the dense model's, in nats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn import functional


def log_probabilities(logits_BTV: Tensor) -> Tensor:
    """Returns log-probabilities, float32 (batch, tokens, vocabulary), of logits of any float dtype."""
    return functional.log_softmax(logits_BTV.float(), dim=-1)


def summed_divergence(now_BTV: Tensor, dense_BTV: Tensor) -> Tensor:
    """Returns ``sum p (log p - log q)`` over all tokens, with p the dense and q the changed predictions, a scalar.

    Args:
        now_BTV: Log-probabilities of the changed model.
        dense_BTV: Log-probabilities of the dense model.
    """
    return functional.kl_div(now_BTV, dense_BTV, reduction="sum", log_target=True)


def mean_divergence(logits: Iterable[Tensor], dense: Sequence[Tensor]) -> float:
    """Returns the mean divergence per token.

    Args:
        logits: Logits of the changed model, (batch, tokens, vocabulary) each.
        dense: Log-probabilities of the dense model for the same batches.
    """
    total, tokens = 0.0, 0
    for batch, before in zip(logits, dense, strict=True):
        total += float(summed_divergence(log_probabilities(batch), before))
        tokens += before.shape[0] * before.shape[1]
    return total / tokens
