"""Rows of text with one label each: batches, training loss, and measures on held-out rows.

Legend of shapes: B rows, T tokens of the longest row, C classes (1 for regression).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, root_mean_squared_error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.labelled import Labelled
from regraft.models.trainable import evaluating
from regraft.progress import SayCount
from regraft.training.batches import Example, padding_token

AT_ONCE = 32  # rows that are evaluated together


def labelled_examples(rows: Labelled, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> list[Example]:
    """Encodes rows of one or two texts by the tokenizer, truncated to a number of tokens, the longer text first.

    Args:
        rows: Texts and labels.
        tokenizer: Tokenizer of the model.
        most_tokens: Longest row in tokens.

    Returns:
        Examples whose labels are scalars: int64 classes, or float32 numbers.
    """
    first, second = [texts[0] for texts in rows.texts], [texts[1] for texts in rows.texts if len(texts) == 2]
    encoded = tokenizer(first, second or None, truncation=True, max_length=most_tokens)
    types = encoded["token_type_ids"] if "token_type_ids" in encoded else [None] * len(rows)
    dtype = torch.int64 if rows.classes else torch.float32
    return [
        Example(torch.tensor(ids), torch.tensor(label, dtype=dtype), token_type_ids=torch.tensor(kinds) if kinds is not None else None)
        for ids, kinds, label in zip(encoded["input_ids"], types, rows.labels, strict=True)
    ]


def collate_labelled(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """Joins rows into a batch, padded on the right to the longest row.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the encoder uses them, ``token_type_ids``, each (B, T) int64; ``labels`` (B,).
    """
    longest = max(len(example.input_ids) for example in examples)
    batch = {
        "input_ids": torch.full((len(examples), longest), padding),
        "attention_mask": torch.zeros(len(examples), longest, dtype=torch.int64),
        "labels": torch.stack([example.labels for example in examples]),
    }
    if examples[0].token_type_ids is not None:
        batch["token_type_ids"] = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = example.input_ids
        batch["attention_mask"][row, :length] = 1
        if example.token_type_ids is not None:
            batch["token_type_ids"][row, :length] = example.token_type_ids
    return batch


def summed_label_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the loss summed over the rows of a batch: cross-entropy in nats, or the squared error."""
    labels_B = batch["labels"]
    logits_BC = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
    if labels_B.is_floating_point():
        return F.mse_loss(logits_BC.squeeze(-1), labels_B, reduction="sum")
    return F.cross_entropy(logits_BC, labels_B, reduction="sum")


def summed_labelled(model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[float, int]:
    """Returns the loss summed over all batches, without dropout and gradients, and the number of rows; the model's mode is restored."""
    total, rows = 0.0, 0
    with evaluating(model):
        for batch in batches:
            total += float(summed_label_loss(model, {name: tensor.to(device) for name, tensor in batch.items()}))
            rows += len(batch["labels"])
    return total, rows


@torch.no_grad()
def judged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Labelled, most_tokens: int, progress: SayCount | None = None
) -> dict[str, float]:
    """Returns the usual measures of a classification or regression model.

    Args:
        model: The model in evaluation mode, perhaps with an adapter.
        tokenizer: Tokenizer of the model.
        rows: Held-out rows.
        most_tokens: Longest row in tokens.
        progress: Called with the number of finished rows and of all rows.

    Returns:
        ``accuracy`` and ``macro_f1`` for classes; ``pearson``, ``spearman`` and ``rmse`` for numbers, with NaN correlation if all numbers
        are equal.
    """
    examples = labelled_examples(rows, tokenizer, most_tokens)
    found: list[Tensor] = []
    for start in range(0, len(examples), AT_ONCE):
        batch = collate_labelled(examples[start : start + AT_ONCE], padding_token(tokenizer))
        del batch["labels"]
        found.append(model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.double().cpu())
        if progress is not None:
            progress(min(start + AT_ONCE, len(examples)), len(examples))
    logits_BC, labels_B = torch.cat(found).numpy(), np.array(rows.labels)
    if rows.classes:
        chosen_B = logits_BC.argmax(-1)
        return {"accuracy": accuracy_score(labels_B, chosen_B), "macro_f1": f1_score(labels_B, chosen_B, average="macro")}
    return figures_of_numbers(logits_BC.squeeze(-1), labels_B)


def figures_of_numbers(values_B: NDArray[np.float64], labels_B: NDArray[np.float64]) -> dict[str, float]:
    """Returns ``pearson``, ``spearman`` (NaN if all values or all labels are equal) and ``rmse`` of predicted numbers."""
    constant = np.ptp(values_B) == 0 or np.ptp(labels_B) == 0
    return {
        "pearson": math.nan if constant else float(cast(Any, pearsonr(values_B, labels_B)).statistic),
        "spearman": math.nan if constant else float(cast(Any, spearmanr(values_B, labels_B)).statistic),
        "rmse": float(root_mean_squared_error(labels_B, values_B)),
    }
