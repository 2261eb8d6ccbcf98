"""What was saved computes what was trained: a folder is loaded again before it gets its name, and compared on a few tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regraft.errors import InputError, OutputError
from regraft.models.classifier import classes_of, is_classifier, load_classifier
from regraft.models.load import Loaded
from regraft.models.load import load as load_model
from regraft.settings import LoadSettings
from regraft.surgery.adapter_folder import load_adapted
from regraft.surgery.probe import Probe, refuse_other

# Of several scripts, so that most tokenizers give tokens of many kinds.
_TEXT = """The mill by the river was built in 1874, and its wheel has turned ever since; on a good day it grinds 3.5 tonnes of rye.
def mean(values): return sum(values) / len(values)  # naïve, für viele Zahlen zu ungenau — 数字が多いと誤差が出る. Что дальше?"""
_TELL = "free memory or take another disk and repeat the command; where it fails again, this is a fault of ours: please report it"


def text_ids(tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Returns the token ids of the text that models are compared on, line by line; none without a tokenizer."""
    return [list(tokenizer(line, verbose=False).input_ids) for line in _TEXT.split("\n")] if tokenizer is not None else []


def prove_model(folder: Path, model: PreTrainedModel, trained: Probe, load: LoadSettings | None = None) -> None:
    """Loads a folder of a merged model again and compares it with what was trained.

    Args:
        folder: The folder, which has not got its name yet.
        model: The model that was saved there.
        trained: What the model with its adapter computed.
        load: Whether code of the folder may run.

    Raises:
        OutputError: It cannot be loaded, or computes something else.
    """
    settings = (load or LoadSettings()).model_copy(update={"device": "cpu", "dtype": "auto", "base": None})
    try:
        again = load_classifier(folder, classes_of(model), settings) if is_classifier(model) else load_model(folder, settings)
    except InputError as error:
        raise OutputError(f"what was saved cannot be loaded again ({error}); {_TELL}") from None
    refuse_other(trained, again.model, "what was saved", _TELL)


def prove_adapter(folder: Path, base: Loaded, trained: Probe, load: LoadSettings | None = None) -> None:
    """Loads the folder of an adapter again on its base and compares it with what was trained.

    Where the base is not to be found as it was, as after changes in memory, nothing is compared.

    Args:
        folder: The folder, which has not got its name yet.
        base: The base; its model may carry the adapter.
        trained: What the model with its adapter computed.
        load: Whether code of the base may run.

    Raises:
        OutputError: It cannot be loaded, or computes something else.
    """
    where = str(base.model.name_or_path or "")
    if not where or not Path(where).is_dir():
        return
    dtype = str(base.model.dtype).removeprefix("torch.")
    settings = (load or LoadSettings()).model_copy(update={"device": "cpu", "dtype": dtype, "base": where})
    try:
        again = load_adapted(folder, settings)
    except InputError as error:
        raise OutputError(f"what was saved cannot be loaded again ({error}); {_TELL}") from None
    refuse_other(trained, again.model, "what was saved", _TELL)
