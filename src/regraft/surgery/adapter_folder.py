"""Loads the folder of an adapter, ours or PEFT's, on the base model that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from regraft.adapters.stock_files import check_patterns, read_stock_config
from regraft.errors import InputError, ModelError, shown
from regraft.models.checks import check_finite
from regraft.models.classifier import HEADS, load_classifier, named_classes
from regraft.models.load import Loaded
from regraft.models.load import load as load_model
from regraft.models.quiet import quiet
from regraft.models.view import fingerprint
from regraft.models.weights import StoredTensor, read_header
from regraft.reading import is_folder, path_of
from regraft.settings import LoadSettings
from regraft.surgery.adapter_files import is_master, read_master
from regraft.surgery.adapters import Injected, load_adapter

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT puts before the names of the base's own tensors


def is_adapter(source: str | Path) -> bool:
    """Returns whether a source is the folder of an adapter, ours or PEFT's, without its model."""
    folder = Path(source)
    return ((folder / ADAPTER_CONFIG).is_file() or is_master(folder)) and not (folder / "config.json").is_file()


def load_adapted(folder: Path, settings: LoadSettings) -> Loaded:
    """Loads the base of an adapter and puts the adapter on it, without folding it into the weights.

    Args:
        folder: An adapter of ours, or one of PEFT with ``adapter_config.json`` and ``adapter_model.safetensors``. A base with a
            relative path is looked for from here, then from the adapter's folder.
        settings: How the base is loaded.

    Returns:
        The base's tokenizer and provenance; ``model`` is the ``PeftModel``, in evaluation mode.

    Raises:
        ModelError: The adapter or its base is missing, damaged or a pickle, or they do not fit: a tensor lacks or is left over.
    """
    if is_master(folder):
        loaded, injected = load_master(folder, settings)
        return replace(loaded, source=str(folder), fingerprint=fingerprint(injected.model))
    base = base_of(folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(f"'{folder}' has no {ADAPTER_WEIGHTS}; save the adapter as safetensors (pickles are not read)")
    header = read_header(weights)
    stored, labels = set(header), _labels_of(header)
    try:
        loaded = load_classifier(base, named_classes(folder, labels), settings) if labels else load_model(base, settings)
    except InputError as error:
        raise ModelError(f"the base model of the adapter '{folder}': {error}") from None
    check_patterns(folder, read_stock_config(folder), (name for name, _ in loaded.model.named_modules()))
    own = {f"{_PREFIX}{name}" for name in loaded.model.state_dict()}
    adapted = _attached(loaded.model, folder)
    # PEFT at most warns where the two differ: the one would stay as at the start of training, the other be left out.
    with quiet():
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, problem in ((wanted - stored, "it lacks"), (stored - wanted - own, "the base has no place for")):
        if names:
            raise ModelError(f"the adapter '{folder}' does not fit its base '{base}': {problem} '{shown(min(names))}'; give its own base")
    check_finite(adapted, str(folder))
    return replace(loaded, model=adapted, source=str(folder), fingerprint=fingerprint(adapted))


def load_master(folder: Path, settings: LoadSettings) -> tuple[Loaded, Injected]:
    """Loads the base of an adapter of ours and puts the adapter on it.

    Raises:
        ModelError: The adapter or its base is missing or damaged, or it was saved for another base.
    """
    stored = read_master(folder)
    base = _found_from(folder, stored.base)
    try:
        loaded = load_classifier(base, stored.classes, settings) if stored.head else load_model(base, settings)
    except InputError as error:
        raise ModelError(f"the base model of the adapter '{folder}': {error}") from None
    injected = load_adapter(loaded.model, folder)
    loaded.model.eval()
    return loaded, injected


def base_of(folder: Path) -> str:
    """Returns the base model that an adapter of PEFT names."""
    base = read_stock_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        path = folder / ADAPTER_CONFIG
        raise ModelError(f"'{path}' names no base model; set base_model_name_or_path to the folder or hub id of the model")
    return _found_from(folder, base)


def _found_from(folder: Path, base: str) -> str:
    """Returns a base that is named by a path relative to here or to its adapter."""
    beside = folder / path_of(base, "base model")
    return str(beside) if not is_folder(Path(base)) and is_folder(beside) else base


def _labels_of(header: Mapping[str, StoredTensor]) -> int:
    """Returns how many outputs the head has that an adapter of PEFT brings for a model for labels; 0 where it brings none."""
    heads = [name for name in header if name.removeprefix(_PREFIX).split(".")[0] in HEADS and name.endswith(".weight")]
    last = max(heads, key=lambda name: (f"{_PREFIX}pre_" not in name, name), default="")
    if last and len(header[last].shape) != 2:
        raise ModelError(f"the adapter's head '{shown(last)}' has the shape {list(header[last].shape)}, not outputs x width; copy it again")
    return header[last].shape[0] if last else 0


def _attached(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Puts an adapter on its base."""
    try:
        with quiet():
            adapted: Any = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except Exception as error:  # whatever PEFT raises on a config or on weights that do not fit
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the adapter '{folder}' does not fit its base: {first[:200].rstrip('.:')}; train it again") from error
    return cast(PreTrainedModel, adapted.eval())
