"""Loss of a causal language model on a text: a pass over the whole of it, through sliding windows.

Documents are independent: no context crosses from one into the next. Every token after the first of a document is predicted
exactly once. Logits are made float32 and losses are added in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.encoding import bos_id
from regraft.data.text import Corpus
from regraft.data.tokens import check_context, context_limit
from regraft.errors import DataError, InputError, ModelError
from regraft.evaluation.inference import evaluating, input_device, vocabulary_size
from regraft.evaluation.sequences import TokenSequence, Window, sequences_of, windows_of
from regraft.plans import LossReport
from regraft.settings import EvaluateSettings

DEFAULT_WINDOW_TOKENS = 512

Progress = Callable[[int, int], None]
"""Is told how many tokens are done, and how many there are."""

# Logits of one forward pass, as float32, stay below this; one window is always taken.
_LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_IGNORED = -100


def evaluate_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: EvaluateSettings | None = None,
    device: torch.device | str | None = None,
    *,
    batch_windows: int | None = None,
    progress: Progress | None = None,
) -> LossReport:
    """Measures loss, perplexity and bits per byte.

    Args:
        model: Of any architecture whose logits depend on earlier tokens alone. Left in the mode it was in.
        tokenizer: Of that model.
        corpus: Documents, or records: of these only the response (and its EOS) is predicted.
        settings: Window, stride, BOS and the number of tokens.
        device: Where the inputs go; None for where the embedding is.
        batch_windows: Windows of one forward pass; None for as many as fit. It does not change the result.
        progress: Called after each forward pass with the tokens that are done and all there are.

    Returns:
        The measurement, with everything needed to repeat it. Perplexity beyond the range of a float is its largest value.

    Raises:
        InputError: Window or stride do not fit the model or one another, or BOS is asked for and the tokenizer has none.
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
            "give more text" + ("" if starts_with_bos else " or --bos true")
        )
    _check_vocabulary(model, sequences)
    tokens = sum(sequence.targets for sequence in sequences)
    n_bytes = sum(sequence.n_bytes for sequence in sequences)
    windows = [part for sequence in sequences for part in windows_of(sequence, window, stride)]
    assert sum(part.scored for part in windows) == tokens, "each token is predicted exactly once"
    total_nats = _total_nats(model, windows, device, batch_windows, progress)
    loss_nats = total_nats / tokens
    return LossReport(
        loss_nats=loss_nats,
        perplexity=math.exp(loss_nats) if loss_nats < math.log(sys.float_info.max) else sys.float_info.max,
        # A single token that stands for no text, such as a leading space of the tokenizer's own, has no bytes at all.
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
    """Returns the window and the stride in tokens: as set, or 512 (the model's limit where that is less) and half the window.

    Raises:
        InputError: The window is longer than the model's context, or the stride longer than the window.
    """
    limit = context_limit(model.config)
    window = settings.window or min(DEFAULT_WINDOW_TOKENS, limit or DEFAULT_WINDOW_TOKENS)
    check_context(window, model.config, "--window")
    stride = settings.stride or max(1, window // 2)
    if stride > window:
        raise InputError(
            f"--stride {stride} exceeds the window of {window} tokens and would skip text between two windows; use at most {window}"
        )
    return window, stride


def _check_vocabulary(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> None:
    rows = vocabulary_size(model)
    largest = max(max(sequence.ids) for sequence in sequences)
    if largest >= rows:
        raise ModelError(f"the tokenizer gives token {largest} but the model's embedding has {rows} rows; use the model's own tokenizer")


def _total_nats(
    model: PreTrainedModel,
    windows: Sequence[Window],
    device: torch.device | str | None,
    batch_windows: int | None,
    progress: Progress | None,
) -> float:
    """Returns the sum over all scored tokens of their negative log-likelihood; stops as soon as it is not finite."""
    where = torch.device(device) if device is not None else input_device(model)
    most_tokens = _LOGITS_BYTES.get(where.type, _LOGITS_BYTES["cpu"]) // (4 * vocabulary_size(model))
    tokens = sum(window.scored for window in windows)
    total_nats, done = 0.0, 0
    with evaluating(model):
        for batch in _batches(windows, most_tokens, batch_windows):
            total_nats += _batch_nats(model, batch, where)
            if not math.isfinite(total_nats):
                raise ModelError(
                    f"the loss of {type(model).__name__} is {total_nats}: its weights or activations are not finite in "
                    f"{model.dtype}; try --dtype float32, or take another model"
                )
            done += sum(window.scored for window in batch)
            if progress is not None:
                progress(done, tokens)
    return total_nats


def _batches(windows: Sequence[Window], most_tokens: int, batch_windows: int | None) -> Iterator[list[Window]]:
    """Groups windows of about equal length, longest first."""
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
    """Returns the summed loss of a batch, added in float64.

    Shorter windows are filled up on the right. Since attention is causal, no token that counts sees the filling, so that no mask
    is needed and attention stays on its fast path.
    """
    length = len(batch[0])
    ids_BL = torch.zeros(len(batch), length, dtype=torch.int64)
    targets_BL = torch.full((len(batch), length), _IGNORED)
    for row, window in enumerate(batch):
        ids = torch.tensor(window.ids[window.start : window.end + 1])
        ids_BL[row, : len(window)] = ids[:-1]
        ids_BL[row, len(window) :] = ids[0]
        first = window.first_scored - window.start
        targets_BL[row, first : len(window)] = ids[1 + first :]
    logits_BLV = model(input_ids=ids_BL.to(device), use_cache=False).logits
    scored_BL = (targets_BL != _IGNORED).to(logits_BLV.device)
    targets_N = targets_BL.to(logits_BLV.device)[scored_BL]
    nats_N = F.cross_entropy(logits_BLV[scored_BL].float(), targets_N, reduction="none")
    return nats_N.double().sum().item()
