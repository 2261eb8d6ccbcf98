"""Measurement of a classification or regression model: accuracy or correlation on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.data.labelled import read_labelled
from regraft.data.tokens import window_tokens
from regraft.errors import InputError
from regraft.models.classifier import classes_of, is_classifier, load_trained_classifier, row_limit
from regraft.models.load import require_tokenizer
from regraft.models.view import parameter_count
from regraft.settings import TRAINING_TOKENS, LabelSettings, LoadSettings
from regraft.surgery.adapter_folder import is_adapter, load_adapted
from regraft.training.labelled import Progress, judged


@dataclass(frozen=True)
class LabelReport:
    """Measures of a classification or regression model.

    Attributes:
        model: Name of the model, as given.
        data: File of the rows.
        task: ``classification`` or ``regression``.
        rows: Number of rows.
        window_tokens: Longest row; longer ones were cut.
        classes: Names of the classes in the order of the outputs; empty for regression.
        parameters: Number of parameters of the model, with its adapter.
        figures: ``accuracy`` and ``macro_f1``, or ``pearson``, ``spearman`` (NaN if all values are equal) and ``rmse``.
    """

    model: str
    data: str
    task: str
    rows: int
    window_tokens: int
    classes: tuple[str, ...]
    parameters: int
    figures: Mapping[str, float]

    def flat(self) -> dict[str, Any]:
        """Returns the report as one flat object of plain JSON types; undefined values are null."""
        rest = {name: getattr(self, name) for name in ("model", "data", "task", "rows", "window_tokens", "parameters")}
        return {
            **rest,
            "classes": list(self.classes),
            **{name: None if math.isnan(value) else value for name, value in self.figures.items()},
        }


def evaluate_labels(
    source: str | Path, settings: LabelSettings, *, load: LoadSettings | None = None, progress: Progress | None = None
) -> LabelReport:
    """Measures a classification or regression model on all rows of a file.

    Args:
        source: Folder or hub id of a model with a classification head, or the folder of an adapter for one.
        settings: The rows. Labels are the model's names of the classes, or their numbers.
        load: Settings for loading the model.
        progress: Called with the number of finished rows and of all rows.

    Raises:
        InputError: The model has no classification head, or no data are given.
        RegraftError: Anything else that the user can mend, in one line.
    """
    load = load or LoadSettings()
    if settings.data is None:
        raise InputError(f"'{source}' is measured on rows with labels; give a file of them with `data`")
    loaded = load_adapted(Path(source), load) if is_adapter(source) else load_trained_classifier(source, load)
    model = loaded.model
    if not is_classifier(model):
        raise InputError(f"'{source}' is for language, not for labels; leave `data` out, or give its text with `text`")
    classes = classes_of(model)
    task = "classification" if classes else "regression"
    rows = read_labelled(settings.data, task, settings.text_columns, settings.label_column, classes)
    most_tokens = window_tokens(settings.seq_len, TRAINING_TOKENS, model.config, "seq_len", row_limit(model))
    figures = judged(model, require_tokenizer(loaded), rows, most_tokens, progress)
    return LabelReport(str(source), rows.name, task, len(rows), most_tokens, classes, parameter_count(model), figures)
