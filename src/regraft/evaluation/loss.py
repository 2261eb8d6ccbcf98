"""Loss of a causal language model on a text, measured over all of it through sliding windows.

Documents are independent: no context crosses from one into the next. Every token after the first of a document is predicted
exactly once. Logits are converted to float32, and losses are summed in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.encoding import bos_id
from regraft.data.instructions import IGNORED
from regraft.data.text import Corpus
from regraft.data.tokens import check_context, context_limit
from regraft.errors import DataError, InputError, ModelError
from regraft.evaluation.inference import input_device, vocabulary_size
from regraft.evaluation.sequences import TokenSequence, Window, sequences_of, windows_of
from regraft.models.trainable import evaluating
from regraft.plans import LossReport
from regraft.progress import SayCount
from regraft.settings import EvaluateSettings

DEFAULT_WINDOW_TOKENS = 512

# Upper limit for the float32 logits of one forward pass; a pass always has at least one window.
_LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


def evaluate_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: EvaluateSettings | None = None,
    device: torch.device | str | None = None,
    *,
    batch_windows: int | None = None,
    progress: SayCount | None = None,
) -> LossReport:
    """Measures loss, perplexity and bits per byte.

    Args:
        model: A model of any causal architecture (logits depend only on earlier tokens). Its mode is restored.
        tokenizer: Tokenizer of the model.
        corpus: Documents, or records; of a record only the response and its EOS are predicted.
        settings: Window, stride, BOS and the number of tokens.
        device: Device of the inputs; None for that of the embedding.
        batch_windows: Number of windows in one forward pass; None for as many as fit. It does not change the result.
        progress: Called after each forward pass with the number of finished tokens and of all tokens.

    Returns:
        The measurement, with all settings needed to repeat it. A perplexity beyond the range of a float is the largest float.

    Raises:
        InputError: Window or stride do not fit the model or each other, or BOS is requested and the tokenizer has none.
        DataError: There is no token to predict.
        ModelError: The loss is not finite, or the tokenizer has tokens that the model lacks.
    """
    settings = settings or EvaluateSettings()
    window, stride = window_and_stride(model, settings)
    sequences = sequences_of(corpus, tokenizer, settings.bos, settings.max_tokens)
    starts_with_bos = bos_id(tokenizer, settings.bos) is not None
    name = f"{corpus.name} (loss on the responses only)" if corpus.records else corpus.name
    if not sequences:
        raise DataError(
            f"'{name}' has no token to predict: its documents are one token each and nothing stands before it; "
            "give more text" + ("" if starts_with_bos else " or `bos=True`")
        )
    check_vocabulary(model, sequences)
    tokens = sum(sequence.targets for sequence in sequences)
    n_bytes = sum(sequence.n_bytes for sequence in sequences)
    windows = [part for sequence in sequences for part in windows_of(sequence, window, stride)]
    assert sum(part.scored for part in windows) == tokens, "each token is predicted exactly once"
    total_nats = _total_nats(model, windows, device, batch_windows, progress)
    loss_nats = total_nats / tokens
    return LossReport(
        loss_nats=loss_nats,
        perplexity=math.exp(loss_nats) if loss_nats < math.log(sys.float_info.max) else sys.float_info.max,
        # A single token without text, such as a leading space that the tokenizer added, has no bytes.
        bits_per_byte=total_nats / math.log(2) / max(1, n_bytes),
        window_tokens=window,
        stride_tokens=stride,
        tokens=tokens,
        bytes=n_bytes,
        documents=len(sequences),
        bos=starts_with_bos,
        text=name,
        split=corpus.split,
    )


def window_and_stride(model: PreTrainedModel, settings: EvaluateSettings) -> tuple[int, int]:
    """Returns window and stride in tokens: as set, or 512 (at most the model's context) and half the window.

    Raises:
        InputError: The window is longer than the model's context, or the stride longer than the window.
    """
    limit = context_limit(model.config)
    window = settings.window or min(DEFAULT_WINDOW_TOKENS, limit or DEFAULT_WINDOW_TOKENS)
    check_context(window, model.config, "window")
    stride = settings.stride or max(1, window // 2)
    if stride > window:
        raise InputError(
            f"`stride={stride}` exceeds the window of {window} tokens and would skip text between two windows; use at most {window}"
        )
    return window, stride


def check_vocabulary(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> None:
    """Checks that a model has every token of some sequences.

    Raises:
        ModelError: The tokenizer gives a token that the model lacks.
    """
    rows = vocabulary_size(model)
    largest = max(max(sequence.ids) for sequence in sequences)
    if largest >= rows:
        raise ModelError(f"the tokenizer gives token {largest} but the model's embedding has {rows} rows; use the model's own tokenizer")


def _total_nats(
    model: PreTrainedModel,
    windows: Sequence[Window],
    device: torch.device | str | None,
    batch_windows: int | None,
    progress: SayCount | None,
) -> float:
    """Returns the summed negative log-likelihood of all scored tokens; raises an error as soon as the sum is not finite."""
    where = torch.device(device) if device is not None else input_device(model)
    most_tokens = most_tokens_on(where, model)
    tokens = sum(window.scored for window in windows)
    total_nats, done = 0.0, 0
    with evaluating(model):
        for batch in batches_of(windows, most_tokens, batch_windows):
            total_nats += _batch_nats(model, batch, where)
            if not math.isfinite(total_nats):
                raise ModelError(
                    f"the loss of {type(model).__name__} is {total_nats}: its weights or activations are not finite in "
                    f"{model.dtype}; try `dtype=float32`, or take another model"
                )
            done += sum(window.scored for window in batch)
            if progress is not None:
                progress(done, tokens)
    return total_nats


def most_tokens_on(device: torch.device, model: PreTrainedModel) -> int:
    """Returns how many tokens one forward pass may have, so that its float32 logits stay within the limit of the device."""
    return _LOGITS_BYTES.get(device.type, _LOGITS_BYTES["cpu"]) // (4 * vocabulary_size(model))


def batches_of(windows: Sequence[Window], most_tokens: int, batch_windows: int | None) -> Iterator[list[Window]]:
    """Yields batches of windows of about equal length, longest first."""
    batch: list[Window] = []
    for window in sorted(windows, key=len, reverse=True):
        full = len(batch) == batch_windows if batch_windows else (len(batch) + 1) * len(batch[0] if batch else window) > most_tokens
        if batch and full:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _batch_nats(model: PreTrainedModel, batch: Sequence[Window], device: torch.device) -> float:
    """Returns the loss of a batch, summed in float64."""
    ids_BL, targets_BL = inputs_of(batch)
    logits_BLV = model(input_ids=ids_BL.to(device), use_cache=False).logits
    scored_BL = (targets_BL != IGNORED).to(logits_BLV.device)
    targets_N = targets_BL.to(logits_BLV.device)[scored_BL]
    nats_N = F.cross_entropy(logits_BLV[scored_BL].float(), targets_N, reduction="none")
    return nats_N.double().sum().item()


def inputs_of(batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Returns token ids and targets of a batch whose longest window is the first, each of shape ``(windows, length)``.

    Shorter windows are padded on the right. Attention is causal, so that no scored token attends to the padding: no mask is needed, and
    attention can use its fast implementation. Targets that are not scored are ``IGNORED``.
    """
    length = len(batch[0])
    ids_BL = torch.zeros(len(batch), length, dtype=torch.int64)
    targets_BL = torch.full((len(batch), length), IGNORED)
    for row, window in enumerate(batch):
        ids = torch.tensor(window.ids[window.start : window.end + 1])
        ids_BL[row, : len(window)] = ids[:-1]
        ids_BL[row, len(window) :] = ids[0]
        first = window.first_scored - window.start
        targets_BL[row, first : len(window)] = ids[1 + first :]
    return ids_BL, targets_BL
