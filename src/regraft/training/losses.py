"""Losses of a causal language model: over fixed batches, against a teacher, and in pieces that save memory.

Legend of shapes: B rows, L tokens of a row, N positions that predict a token, D residual channels, V vocabulary, K tokens kept of a
teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.data.instructions import IGNORED
from regraft.models.trainable import evaluating
from regraft.numerics.divergence import summed_divergence


def predicted_tokens(labels: Tensor) -> int:
    """Returns the number of predicted tokens of a batch: those with a label that are not first in their row.

    Args:
        labels: ``(batch, tokens)`` int64, ``-100`` for tokens that are not predicted.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def predicting(labels: Tensor) -> Tensor:
    """Returns a mask of the positions that predict a token with a label: bool ``(batch, tokens)``, never the last of a row."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def summed_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[float, int]:
    """Returns the summed negative log-likelihood of all predicted tokens in nats, without dropout and gradients, and their number.

    Args:
        model: A model with inputs ``input_ids`` and ``attention_mask`` and output ``logits``; its mode is restored at the end. The
            model's own loss is not used, because AdaLoRA and mixtures of experts add terms to it.
        batches: Batches with at least one predicted token each.
        device: Device of the model.
    """
    total_nats, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            given = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = given.pop("labels")
            at = predicting(labels)
            logits_NV, labels_N = model(**given).logits[at].float(), labels.roll(-1, dims=1)[at]
            total_nats += float(F.cross_entropy(logits_NV, labels_N, reduction="sum"))
            tokens += len(labels_N)
    return total_nats, tokens


def mean_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> float:
    """Returns the mean negative log-likelihood of a predicted token in nats; see :func:`summed_loss`.

    Batches are weighted by their numbers of predicted tokens, unlike in a mean of batch means.
    """
    total_nats, tokens = summed_loss(model, batches, device)
    return total_nats / tokens


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Returns the summed KL divergence from teacher to student at a temperature, times the temperature squared, in nats.

    This is the loss of knowledge distillation (Hinton et al., arXiv 1503.02531, section 2.1). The gradient of a softened divergence falls
    with 1/T²; the factor T² keeps its share in a sum with the task loss.

    Args:
        student_NV: Logits, float32 or better.
        teacher_NV: Logits of the same positions.
        temperature: T.
    """
    log_q_NV = torch.log_softmax(student_NV / temperature, dim=-1)
    log_p_NV = torch.log_softmax(teacher_NV.to(student_NV.dtype) / temperature, dim=-1)
    return temperature**2 * summed_divergence(log_q_NV, log_p_NV)


def divergence_of_top(student_NV: Tensor, log_p_NK: Tensor, tokens_NK: Tensor, temperature: float) -> Tensor:
    """Returns the divergence as :func:`divergence` does, for a teacher of which only the K likeliest tokens are known.

    All other tokens together count as one outcome, for the teacher and for the student: it is the divergence between two distributions over
    K + 1 outcomes. Nothing is renormalised, so that probability of the student outside the K tokens is penalised. Merging outcomes can only
    lower a divergence (log-sum inequality); with K = V the result is exact.

    Args:
        student_NV: Logits, float32 or better.
        log_p_NK: Log-probabilities of the teacher at this temperature, normalised over all V tokens.
        tokens_NK: The teacher's K tokens, int64, each at most once in a row.
        temperature: T.
    """
    scaled_NV = student_NV / temperature
    log_all_N = torch.logsumexp(scaled_NV, dim=-1)
    log_q_NK = scaled_NV.gather(-1, tokens_NK) - log_all_N[:, None]
    p_NK = log_p_NK.exp()
    found_N = (p_NK * (log_p_NK - log_q_NK)).sum(-1)
    if tokens_NK.shape[-1] < student_NV.shape[-1]:
        log_rest_N = torch.logsumexp(scaled_NV.scatter(-1, tokens_NK, float("-inf")), dim=-1) - log_all_N
        rest_N = (1.0 - p_NK.sum(-1)).clamp_min(torch.finfo(p_NK.dtype).tiny)
        found_N = found_N + rest_N * (rest_N.log() - log_rest_N)
    return temperature**2 * found_N.sum()


class _InPieces(torch.autograd.Function):
    """A sum of a loss over pieces of its input; each piece's gradient is computed at once, so that only one piece is in memory."""

    @staticmethod
    def forward(ctx: Any, input_ND: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=input_ND.device)
        gradient_ND = torch.empty_like(input_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(input_ND), rows):
            piece = slice(start, start + rows)
            part_nD = input_ND[piece].detach().requires_grad_(gradient_ND is not None)
            with torch.set_grad_enabled(gradient_ND is not None):
                loss = loss_of(part_nD, piece)
            if gradient_ND is not None:
                (gradient_ND[piece],) = torch.autograd.grad(loss, part_nD)
            total += loss.detach()
        ctx.gradient_ND = gradient_ND
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (above,) = gradients
        return ctx.gradient_ND * above, None, None


def in_pieces(input_ND: Tensor, loss_of: Callable[[Tensor, slice], Tensor], rows: int) -> Tensor:
    """Returns the sum of a loss over pieces of at most ``rows`` rows, float32, with the intermediate values of one piece in memory.

    With hidden states as the input and a head inside the loss, the logits of all positions never exist at once. Only the input gets a
    gradient; other tensors that the loss uses, such as a frozen head, get none.

    Args:
        input_ND: Hidden states, or logits.
        loss_of: Function from some rows and their slice to the sum of their losses.
        rows: Number of rows in a piece.
    """
    return _InPieces.apply(input_ND, loss_of, rows)  # pyright: ignore[reportReturnType]
