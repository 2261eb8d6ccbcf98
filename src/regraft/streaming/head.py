"""Gradient of the language-modelling loss with respect to the last hidden states, with the output projection in blocks of rows.

For one token with logits z and target y the loss is ``logsumexp(z) - z_y`` and its gradient is ``softmax(z) - onehot(y)``. Both can be
computed from blocks of the vocabulary: a first sweep over the blocks gives the normaliser, a second sweep the gradient. The last norm
before the projection and the treatment of the logits after it (a soft cap, a scale) are the model's own code, under autograd. The only
assumption is that each logit is treated independently of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from regraft.compat import own_parameters
from regraft.models.layerwise import layers_give
from regraft.streaming.hidden import HiddenStates
from regraft.streaming.skeleton import Skeleton


def loss_gradient(skeleton: Skeleton, windows_NT: Tensor, hidden: HiddenStates, slot: int, rows: int, tokens: int) -> None:
    """Writes the gradient of each window's mean loss with respect to the hidden states in ``slot`` into slot ``slot + 1``.

    Args:
        skeleton: The checkpoint.
        windows_NT: Calibration tokens, int64 (windows, tokens), at least two tokens long.
        hidden: Hidden states, with the outputs of the last layer in ``slot``.
        slot: Slot of the last layer's outputs.
        rows: Number of rows of the output projection in memory at a time.
        tokens: Number of tokens whose logits are in memory at a time.
    """
    count, length = windows_NT.shape
    targets_NP = windows_NT[:, 1:].to(skeleton.device)

    def slope(window: int, part: slice, first_row: int, log_probabilities_PV: Tensor) -> Tensor:
        slope_PV = log_probabilities_PV.exp_()
        column_P = targets_NP[window, part] - first_row
        here_P = (column_P >= 0) & (column_P < slope_PV.shape[1])
        slope_PV[here_P, column_P[here_P]] -= 1.0
        return slope_PV.div_(length - 1)

    _two_sweeps(skeleton, hidden, slot, (count, length - 1), rows, tokens, slope)


def drawn_gradient(skeleton: Skeleton, uniforms_NT: Tensor, hidden: HiddenStates, slot: int, rows: int, tokens: int) -> None:
    """Writes gradients with respect to the hidden states in ``slot`` into slot ``slot + 1``: of the log-likelihood of drawn tokens.

    At every position one token is drawn from the prediction, the first at which the cumulated probability exceeds a uniform number, as in
    :func:`regraft.compression.gather.drawn_log_likelihood`; the gradients are those of the sum over all positions.

    Args:
        skeleton: The checkpoint.
        uniforms_NT: A number from 0 to 1 for every token, float64 (windows, tokens).
        hidden: Hidden states, with the outputs of the last layer in ``slot``.
        slot: Slot of the last layer's outputs.
        rows: Number of rows of the output projection in memory at a time.
        tokens: Number of tokens whose logits are in memory at a time.
    """
    cumulated_NT = torch.zeros(uniforms_NT.shape, dtype=torch.float64, device=skeleton.device)
    chances_NT = uniforms_NT.to(skeleton.device)
    total = skeleton.head.weight.shape[0]

    def slope(window: int, part: slice, first_row: int, log_probabilities_PV: Tensor) -> Tensor:
        slope_PV = log_probabilities_PV.exp_()
        before_P, chance_P = cumulated_NT[window, part], chances_NT[window, part]
        after_PV = before_P[:, None] + slope_PV.cumsum(dim=-1, dtype=torch.float64)
        column_P = (after_PV <= chance_P[:, None]).sum(dim=-1)
        width = slope_PV.shape[1]
        if first_row + width == total:  # what rounding left of the last token
            column_P = column_P.clamp_max(width - 1)
        here_P = (before_P <= chance_P) & (column_P < width)
        cumulated_NT[window, part] = after_PV[:, -1]
        slope_PV.neg_()
        slope_PV[here_P, column_P[here_P]] += 1.0
        return slope_PV

    count, length = uniforms_NT.shape
    _two_sweeps(skeleton, hidden, slot, (count, length), rows, tokens, slope)


def _two_sweeps(
    skeleton: Skeleton,
    hidden: HiddenStates,
    slot: int,
    shape: tuple[int, int],
    rows: int,
    tokens: int,
    slope: Callable[[int, slice, int, Tensor], Tensor],
) -> None:
    """Writes a gradient with respect to hidden states, from the log-probabilities of blocks of the vocabulary.

    Args:
        skeleton: The checkpoint.
        hidden: Hidden states, with the outputs of the last layer in ``slot``.
        slot: Slot of the last layer's outputs; the gradient goes into the next.
        shape: Windows, and positions of each, from the first on, whose predictions count.
        rows: Number of rows of the output projection in memory at a time.
        tokens: Number of tokens whose logits are in memory at a time.
        slope: Returns the gradient with respect to logits, (positions, rows), for a window, some of its positions, the index of the first
            row and the log-probabilities, which it may overwrite. It is called for the blocks of each position in order.
    """
    count, length = shape
    normaliser_NP = torch.full(shape, -torch.inf, device=skeleton.device)
    blocks = _Blocks(skeleton, rows)
    for _, weight_VD, bias_V in blocks:
        for window in range(count):
            entering_TD = hidden.get(slot, window, 1)[0].to(skeleton.device)
            for part in _parts(length, tokens):
                with torch.no_grad():
                    logits_PV = _logits(skeleton, entering_TD[part], weight_VD, bias_V)
                normaliser_NP[window, part] = torch.logaddexp(normaliser_NP[window, part], logits_PV.logsumexp(dim=-1))
    for first_row, weight_VD, bias_V in blocks:
        for window in range(count):
            entering_TD = hidden.get(slot, window, 1)[0].to(skeleton.device)
            gradient_TD = torch.zeros_like(entering_TD) if first_row == 0 else hidden.get(slot + 1, window, 1)[0].to(skeleton.device)
            for part in _parts(length, tokens):
                leaf_PD = entering_TD[part].detach().requires_grad_(True)
                with torch.enable_grad():
                    logits_PV = _logits(skeleton, leaf_PD, weight_VD, bias_V)
                outer_PV = slope(window, part, first_row, logits_PV.detach() - normaliser_NP[window, part, None])
                (added_PD,) = torch.autograd.grad(logits_PV, leaf_PD, outer_PV)
                gradient_TD[part] += added_PD
            hidden.put(slot + 1, window, gradient_TD.unsqueeze(0))


class _Blocks:
    """The output projection in blocks of rows; it is read only once if one block holds all rows."""

    def __init__(self, skeleton: Skeleton, rows: int) -> None:
        self._skeleton = skeleton
        self._rows = rows
        self._last: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields the index of the first row, the rows (V, D), and their biases (V,) or None."""
        bias = own_parameters(self._skeleton.head).get("bias")
        total = self._skeleton.head.weight.shape[0]
        for first in range(0, total, self._rows):
            stop = min(total, first + self._rows)
            if self._last is None or self._last[0] != first:
                self._last = None  # frees the old block before the new one is read
                self._last = (first, self._skeleton.head_rows(first, stop))
            yield first, self._last[1], None if bias is None else bias[first:stop]


def _logits(skeleton: Skeleton, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Returns the logits (P, V) of some rows of the vocabulary by the model's own code, with each token as a sequence of length one."""
    ids = torch.zeros(hidden_PD.shape[0], 1, dtype=torch.int64, device=hidden_PD.device)
    with skeleton.projecting(lambda normed: functional.linear(normed, weight_VD, bias_V)), layers_give(skeleton.view, hidden_PD[:, None]):
        return skeleton.view.model(input_ids=ids, use_cache=False).logits[:, 0].float()


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
