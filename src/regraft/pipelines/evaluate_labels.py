"""Measurement of a classification or regression model: accuracy or correlation on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.data.labelled import read_labelled
from regraft.data.tokens import window_tokens
from regraft.errors import InputError, ModelError
from regraft.in_short import in_short
from regraft.models.classifier import classes_of, is_classifier, load_trained_classifier, row_limit
from regraft.models.live import fitting_tokenizer, lineage, place_of, plain
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.trainable import evaluating
from regraft.models.view import parameter_count
from regraft.progress import SayCount
from regraft.reading import is_file
from regraft.settings import TRAINING_TOKENS, LabelSettings, LoadSettings, takes_settings, with_keywords
from regraft.surgery.adapter_folder import is_adapter, load_adapted
from regraft.training.labelled import judged


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    def flat(self) -> dict[str, Any]:
        """Returns the report as one flat object of plain JSON types; undefined values are null."""
        rest = {name: getattr(self, name) for name in ("model", "data", "task", "rows", "window_tokens", "parameters")}
        return {
            **rest,
            "classes": list(self.classes),
            **{name: None if math.isnan(value) else value for name, value in self.figures.items()},
        }


@takes_settings(LabelSettings, LoadSettings)
def evaluate_labels(
    model: PreTrainedModel | PeftModel | str | Path,
    settings: LabelSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load: LoadSettings | None = None,
    progress: SayCount | None = None,
    **keywords: Any,
) -> LabelReport:
    """Measures a classification or regression model on all rows of a file.

    Args:
        model: A ``PreTrainedModel`` or ``PeftModel`` with a classification head in memory, which is left as it is; or the folder or hub
            id of one, or the folder of an adapter for one.
        settings: The rows. Labels are the model's names of the classes, or their numbers.
        tokenizer: The tokenizer for a model in memory.
        load: How a folder or hub id is loaded.
        progress: Called with the number of finished rows and of all rows.
        **keywords: Single settings by name, such as ``data="rows.csv"``; they count before those in ``settings`` and ``load``.

    Raises:
        InputError: The model has no classification head, or no data are given.
        RegraftError: Anything else that the user can mend, in one line.
    """
    settings, load = with_keywords("regraft.evaluate_labels", keywords, settings or LabelSettings(), load or LoadSettings())
    named = type(model).__name__ if place_of(model) is None else f"'{model}'"
    if settings.data is None:
        raise InputError(f"{named} is measured on rows with labels; give a file of them with `data`")
    if not is_file(settings.data):
        read_labelled(settings.data, "classification", settings.text_columns, settings.label_column)  # refuses it before a model is read
    loaded = _taken(model, tokenizer, load)
    if not is_classifier(loaded.model):
        raise InputError(f"{named} is for language, not for labels; leave `data` out, or give its text with `text`")
    classes = classes_of(loaded.model)
    task = "classification" if classes else "regression"
    rows = read_labelled(settings.data, task, settings.text_columns, settings.label_column, classes)
    most_tokens = window_tokens(settings.seq_len, TRAINING_TOKENS, loaded.model.config, "`seq_len`", row_limit(loaded.model))
    with evaluating(loaded.model):
        figures = judged(loaded.model, require_tokenizer(loaded), rows, most_tokens, progress)
    parameters = parameter_count(loaded.model)
    return LabelReport(loaded.source, rows.name, task, len(rows), most_tokens, classes, parameters, figures)


def _taken(model: PreTrainedModel | PeftModel | str | Path, tokenizer: PreTrainedTokenizerBase | None, load: LoadSettings) -> Loaded:
    match model:
        case str() | Path():
            return load_adapted(Path(model), load) if is_adapter(model) else load_trained_classifier(model, load)
        case _:
            base = plain(model)
    if base.config.get_text_config().pad_token_id is None:
        raise ModelError(f"{type(base).__name__} has no `config.pad_token_id`, which tells where a row ends; set it to the tokenizer's")
    found = lineage(base)
    return Loaded(cast(PreTrainedModel, model), fitting_tokenizer(tokenizer, base), found.source, "", found.provenance)
