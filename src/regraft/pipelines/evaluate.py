"""Measurement of a model: loss on held-out text, size and, if requested, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.errors import InputError
from regraft.evaluation.harness import measure
from regraft.models.classifier import is_classifier, is_classifier_folder
from regraft.models.live import ModelLike, check_predicts, fitting_tokenizer, lineage, place_of, plain
from regraft.models.load import Loaded, locate_by, require_tokenizer
from regraft.models.load import load as load_model
from regraft.models.trainable import evaluating
from regraft.pipelines.texts import Texts, in_memory, path_in, read, text_for
from regraft.plans import Measurement
from regraft.progress import SayCount
from regraft.settings import EvaluateSettings, LoadSettings, takes_settings, with_keywords
from regraft.surgery.adapter_folder import is_adapter, load_adapted


@takes_settings(EvaluateSettings, LoadSettings)
def evaluate_model(
    model: ModelLike | PeftModel,
    settings: EvaluateSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: Texts | None = None,
    load: LoadSettings | None = None,
    seed: int = 0,
    label: str | None = None,
    folder: Path | None = None,
    progress: SayCount | None = None,
    **keywords: Any,
) -> Measurement:
    """Measures a model by the common harness.

    Args:
        model: A ``PreTrainedModel`` or ``PeftModel`` in memory; or a model folder, a hub id, ``seedling``, or the folder of an adapter,
            whose base is loaded with it.
        settings: The text and how it is read.
        tokenizer: The tokenizer for a model in memory.
        text: Held-out text: a file, texts, or a data set with a column ``text``.
        load: How a folder or hub id is loaded.
        seed: Seed for the random prompt that speed is measured with.
        label: Name of the measurement; None for the source.
        folder: Where the files of a model in memory are, for their size; None where it was never saved.
        progress: Called with the numbers of tokens done and in all.
        **keywords: Single settings by name, such as ``window=512``; they count before those in ``settings`` and ``load``.

    Returns:
        Loss, size and, with ``speed``, speed.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    chosen, load = with_keywords("regraft.evaluate", keywords, settings or EvaluateSettings(), load or LoadSettings())
    if text is not None:
        chosen = chosen.model_copy(update={"text": path_in(text)})
    texts = in_memory(text)
    given = texts if texts is not None else chosen.text
    place = place_of(model)
    if place is not None and is_classifier_folder(Path(place)):
        raise not_for_labels(place)
    corpus = read(given, "test", "text") if given is not None else None  # a wrong file is refused before a model is loaded
    loaded, own_folder = taken(model, tokenizer, load)
    if is_classifier(loaded.model):
        raise not_for_labels(loaded.source)
    if corpus is None:
        corpus = text_for(loaded, None, "test", "text")
    name = label if label is not None else (loaded.source if place is None else str(place))
    with evaluating(loaded.model):
        where = folder if folder is not None else own_folder
        return measure(name, loaded.model, require_tokenizer(loaded), corpus, chosen, where, seed=seed, progress=progress)


def taken(model: ModelLike | PeftModel, tokenizer: PreTrainedTokenizerBase | None, load: LoadSettings) -> tuple[Loaded, Path | None]:
    """Returns the model to measure and the folder of its files.

    Raises:
        RegraftError: The model cannot be loaded, or is none.
    """
    match model:
        case Loaded():
            return model, None
        case str() | Path() if is_adapter(model):
            return load_adapted(Path(model), load), Path(model)
        case str() | Path():
            return load_model(model, load), locate_by(model, load)
        case _:
            base = plain(model)
            if not is_classifier(base):
                check_predicts(base)
            found = lineage(base)
            return Loaded(cast(PreTrainedModel, model), fitting_tokenizer(tokenizer, base), found.source, "", found.provenance), None


def not_for_labels(source: str | Path) -> InputError:
    """Returns the error for a model for labels that is measured as one for language."""
    return InputError(f"'{source}' is for labels, not for language; measure it on rows with labels: `data`")
