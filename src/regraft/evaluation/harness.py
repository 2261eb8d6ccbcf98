"""The harness that measures dense, pruned and recovered models in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.text import Corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.evaluation.size import measure_size
from regraft.evaluation.speed import compare_speed
from regraft.plans import Measurement, to_dict
from regraft.progress import SayCount
from regraft.settings import EvaluateSettings


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        model: The model, in memory.
        tokenizer: Tokenizer of the model.
        folder: Folder with the model's safetensors files; None when it was never saved.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None = None


def measure(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: EvaluateSettings | None = None,
    folder: Path | None = None,
    *,
    seed: int = 0,
    progress: SayCount | None = None,
) -> Measurement:
    """Measures one model: loss on a corpus, size, and with ``settings.speed`` also speed.

    Raises:
        InputError: A setting does not fit the model.
        DataError: The corpus has no token to predict.
        ModelError: The loss is not finite.
    """
    subjects = {label: Subject(model, tokenizer, folder)}
    return measure_together(subjects, corpus, settings, seed=seed, progress=progress)[label]


def measure_together(
    subjects: Mapping[str, Subject],
    corpus: Corpus,
    settings: EvaluateSettings | None = None,
    *,
    seed: int = 0,
    progress: SayCount | None = None,
) -> dict[str, Measurement]:
    """Measures several models on the same text. Speeds are measured in turns, so that their ratios hold on a busy machine.

    Args:
        subjects: Models by label, such as ``dense``, ``pruned``, ``recovered``.
        corpus: The text to predict.
        settings: Window, stride, BOS, number of tokens, and whether speed is measured.
        seed: Seed of the prompt for the speed measurement.
        progress: Called with the number of finished tokens and of all tokens, from zero for each model.

    Returns:
        Measurements by label, in the same order.

    Raises:
        RegraftError: As in :func:`measure`.
    """
    settings = settings or EvaluateSettings()
    losses = {label: evaluate_loss(one.model, one.tokenizer, corpus, settings, progress=progress) for label, one in subjects.items()}
    sizes = {label: measure_size(one.model, one.folder, losses[label].window_tokens) for label, one in subjects.items()}
    speeds = compare_speed({label: one.model for label, one in subjects.items()}, seed=seed) if settings.speed else {}
    return {label: Measurement(label, losses[label], sizes[label], speeds.get(label)) for label in subjects}


def flat(measurement: Measurement) -> dict[str, Any]:
    """Returns a measurement as one flat object: ``model``, then loss, size and, if it was measured, speed."""
    parts = to_dict(measurement)
    return {"model": parts["label"], **parts["loss"], **parts["size"], **(parts["speed"] or {})}
