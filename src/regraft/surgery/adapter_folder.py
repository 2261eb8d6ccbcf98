"""Loads the folder of an adapter, ours or PEFT's, on the base model that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from regraft.adapters.peft_backed import layers_of
from regraft.adapters.plain_lora import PEFT_PREFIX
from regraft.adapters.stock_files import check_patterns, read_stock_config
from regraft.errors import InputError, ModelError, shown
from regraft.models.checks import check_finite
from regraft.models.classifier import HEADS, load_classifier, named_classes
from regraft.models.load import Loaded
from regraft.models.load import load as load_model
from regraft.models.places import NAME, places_of, where_it_may_be
from regraft.models.provenance import read_provenance
from regraft.models.quiet import quiet
from regraft.models.view import digest_of, fingerprint, fingerprint_of
from regraft.models.weights import StoredTensor, read_header
from regraft.reading import is_folder, path_of
from regraft.settings import LoadSettings
from regraft.surgery.adapted import adapted_modules, unwrap
from regraft.surgery.adapter_files import base_fingerprint, is_master, read_master
from regraft.surgery.adapters import Injected, load_adapter

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(source: str | Path) -> bool:
    """Returns whether a source is the folder of an adapter, ours or PEFT's, without its model."""
    folder = Path(source)
    return ((folder / ADAPTER_CONFIG).is_file() or is_master(folder)) and not (folder / "config.json").is_file()


def load_adapted(folder: Path, settings: LoadSettings) -> Loaded:
    """Loads the base of an adapter and puts the adapter on it, without folding it into the weights.

    Args:
        folder: An adapter of ours, or one of PEFT with ``adapter_config.json`` and ``adapter_model.safetensors``.
        settings: How the base is loaded, and with ``base`` from where. Without it, it is looked for by the name that the adapter gives,
            beside the adapter, and where it lay when regraft saved the adapter.

    Returns:
        The base's tokenizer and provenance; ``model`` is the ``PeftModel``, in evaluation mode.

    Raises:
        ModelError: The adapter or its base is missing, damaged or a pickle, or they do not fit: a tensor lacks or is left over.
    """
    if is_master(folder):
        loaded, injected = load_master(folder, settings)
        return replace(loaded, source=str(folder), fingerprint=fingerprint(injected.model))
    base, adapted = attached(folder, settings)
    return replace(base, model=adapted, source=str(folder), fingerprint=fingerprint(adapted))


def attached(folder: Path, settings: LoadSettings) -> tuple[Loaded, PreTrainedModel]:
    """Loads the base of a stock adapter and puts the adapter on it.

    Returns:
        The base, with the fingerprint that it has alone, and the ``PeftModel`` around it in evaluation mode.

    Raises:
        ModelError: As :func:`load_adapted`.
    """
    named = named_base(folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(f"'{folder}' has no {ADAPTER_WEIGHTS}; save the adapter as safetensors (pickles are not read)")
    header = read_header(weights)
    stored, labels = set(header), _labels_of(header)

    def opened(place: str, plain: LoadSettings) -> Loaded:
        return load_classifier(place, named_classes(folder, labels), plain) if labels else load_model(place, plain)

    loaded, base = _base(folder, named, settings, opened, "" if labels else None)
    check_patterns(folder, read_stock_config(folder), (name for name, _ in loaded.model.named_modules()))
    own = {f"{PEFT_PREFIX}{name}" for name in loaded.model.state_dict()}
    # PEFT stores the table of an embedding that it adapts, once more in a wrapper's own name, as it was in its base.
    own |= {
        f"{name.removesuffix('.weight')}.{part}.weight" for name in own for part in ("base_layer", "modules_to_save", "original_module")
    }
    _check_rows(folder, base, loaded.model, header)
    adapted = _attached(loaded.model, folder)
    # PEFT at most warns where the two differ: the one would stay as at the start of training, the other be left out.
    with quiet():
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, problem in ((wanted - stored, "it lacks"), (stored - wanted - own, "the base has no place for")):
        if names:
            raise ModelError(f"the adapter '{folder}' does not fit its base '{base}': {problem} '{shown(min(names))}'; give its own base")
    check_finite(adapted, str(folder))
    return loaded, adapted


def load_master(folder: Path, settings: LoadSettings) -> tuple[Loaded, Injected]:
    """Loads the base of an adapter of ours and puts the adapter on it.

    Raises:
        ModelError: The adapter or its base is missing or damaged, or it was saved for another base.
    """
    stored = read_master(folder)

    def opened(place: str, plain: LoadSettings) -> Loaded:
        return load_classifier(place, stored.classes, plain) if stored.head else load_model(place, plain)

    loaded, _ = _base(folder, stored.base, settings, opened, stored.base_fingerprint)
    injected = load_adapter(loaded.model, folder)
    loaded.model.eval()
    return loaded, injected


def bare_base(folder: Path, settings: LoadSettings) -> tuple[Loaded, dict[str, Any]]:
    """Returns the base of an adapter as it is without it, and what the adapter is, after it was put on to see that it fits.

    Returns:
        The base; and ``folder``, ``method``, ``modules`` (how many), ``ranks`` (the smallest and the largest), ``parameters`` and ``base``.

    Raises:
        ModelError: As :func:`load_adapted`.
    """
    if is_master(folder):
        stored = read_master(folder)
        loaded, injected = load_master(folder, settings)
        ranks = [int(spec["rank"]) for spec in stored.modules.values()]
        parts = [*stored.head.values(), *(tensor for tensors in stored.tensors.values() for tensor in tensors.values())]
        count, method, modules = sum(tensor.numel() for tensor in parts), stored.method, len(stored.modules)
        for name, module in adapted_modules(injected.model).items():
            unwrap(injected.model, name, module.base)
    else:
        loaded, model = attached(folder, settings)
        adapted = cast(PeftModel, model)
        layers = list(layers_of(adapted))
        method, modules = str(read_stock_config(folder)["peft_type"]).lower(), len(layers)
        ranks = [int(rank) for _, layer in layers for rank in getattr(layer, "r", {}).values()]
        count = sum(tensor.numel for tensor in read_header(folder / ADAPTER_WEIGHTS).values())
        cast(Any, adapted.base_model).unload()
    facts = {"folder": str(folder), "method": method, "modules": modules, "ranks": [min(ranks), max(ranks)] if ranks else []}
    return loaded, {**facts, "parameters": count, "base": loaded.source}


def fingerprint_without(model: PreTrainedModel) -> str:
    """Returns the fingerprint that a model with a LoRA of PEFT in it has without it: that of its base."""
    return fingerprint_of(
        (name.replace(".base_layer.", "."), tuple(parameter.shape), parameter.dtype, digest_of(parameter))
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    )


def named_base(folder: Path) -> str:
    """Returns the base model that an adapter of PEFT names."""
    base = read_stock_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        path = folder / ADAPTER_CONFIG
        raise ModelError(f"'{path}' names no base model; set base_model_name_or_path to the folder or hub id of the model")
    return str(path_of(base, "base model")) if "\0" in base else base


def base_record(base: str, loaded: Loaded, folder: Path) -> dict[str, str]:
    """Returns what finds the base of an adapter again, for the record of the adapter's folder.

    Args:
        base: The base, as its users name it.
        loaded: The base as it was loaded.
        folder: The adapter's folder.
    """
    opened = str(loaded.model.name_or_path or "") or None
    return {**places_of(base, folder, opened), "fingerprint": loaded.fingerprint, "dtype": str(loaded.model.dtype)}


def _base(
    folder: Path, named: str, settings: LoadSettings, opened: Callable[[str, LoadSettings], Loaded], own: str | None
) -> tuple[Loaded, str]:
    """Loads the base of an adapter from the first place that holds the model it was trained on; returns the place too.

    Args:
        folder: The adapter's folder.
        named: Its base, as its users name it.
        settings: How the base is loaded, and perhaps from where.
        opened: Loads a model.
        own: Fingerprint of the base by :func:`base_fingerprint`; empty for none, None for that of the folder's record.

    Raises:
        ModelError: It is nowhere, or cannot be loaded, or every model that was found is another.
    """
    provenance = read_provenance(folder)
    recorded = provenance.settings.get("base") if provenance is not None else None
    recorded = recorded if isinstance(recorded, Mapping) and recorded.get(NAME) == named else {}
    plain = settings.model_copy(update={"base": None})
    places = [settings.base] if settings.base else where_it_may_be(str(path_of(named, "base model")), folder, recorded)
    for place in places:
        try:
            loaded = opened(place, plain)
        except InputError as error:
            remedy = "" if settings.base or is_folder(Path(place)) else "; say with `base` where it lies"
            raise ModelError(f"the base model of the adapter '{folder}': {error}{remedy}") from None
        if own is None:
            same = recorded.get("dtype") != str(loaded.model.dtype) or recorded.get("fingerprint") == loaded.fingerprint
        else:
            same = len(places) == 1 or not own or base_fingerprint(loaded.model) == own
        if same:
            return loaded, place
    raise ModelError(
        f"the adapter '{folder}' was saved for another base: '{shown(named)}' with fingerprint "
        f"{shown(own or recorded.get('fingerprint'), 40)}, '{shown(places[-1])}' is another model; say with `base` where its own lies"
    )


def _check_rows(folder: Path, base: str, model: PreTrainedModel, header: Mapping[str, StoredTensor]) -> None:
    """Refuses an adapter that was trained on a base with more or fewer rows in its embedding, by the number of rows.

    Raises:
        ModelError: The two numbers differ.
    """
    ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = int(ends[0].weight.shape[0])
    names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    rows_at = {"lora_embedding_A": 1, "lora_B.weight": 0, "base_layer.weight": 0, "weight": 0, "modules_to_save.weight": 0}
    for name, tensor in header.items():
        parts = name.removeprefix(PEFT_PREFIX)
        axis = next((axis for end, axis in rows_at.items() if parts.removesuffix(f".{end}") in names), None)
        if axis is not None and len(tensor.shape) > axis and tensor.shape[axis] != rows:
            raise ModelError(
                f"the adapter '{folder}' was trained with {tensor.shape[axis]} rows in the embedding against {rows} of its base '{base}'; "
                "resize the base as it was then, model.resize_token_embeddings(...), save it, and give that folder with `base`"
            )


def _labels_of(header: Mapping[str, StoredTensor]) -> int:
    """Returns how many outputs the head has that an adapter of PEFT brings for a model for labels; 0 where it brings none."""
    heads = [name for name in header if name.removeprefix(PEFT_PREFIX).split(".")[0] in HEADS and name.endswith(".weight")]
    last = max(heads, key=lambda name: (f"{PEFT_PREFIX}pre_" not in name, name), default="")
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
