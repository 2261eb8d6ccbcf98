"""Load and save models for sequence classification and regression: an encoder or a decoder with a head for labels.

Only the head, and modules between it and the layers, may be missing from the checkpoint. They are then initialized from a seed and trained
together with every adapter. A head for another task in the checkpoint is ignored. Every architecture is accepted for which transformers has
a class for sequence classification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as ARCHITECTURES

from regraft.atomic import atomic_folder
from regraft.errors import ModelError, shown
from regraft.models.checks import check_checksums, check_finite, check_is_model
from regraft.models.folder import write_folder
from regraft.models.load import Loaded, checkpoint_as, device_named, locate_by, read_config
from regraft.models.provenance import read_provenance
from regraft.models.quiet import quiet
from regraft.models.tokenizer import load_tokenizer
from regraft.models.view import fingerprint
from regraft.models.weights import stored_tensors, weight_files, weights_dtype
from regraft.plans import Provenance
from regraft.reading import read_object
from regraft.settings import LoadSettings

HEADS = ("classifier", "pre_classifier", "score")
"""Names, in models for sequence classification, of the layers that are new to a task."""

BETWEEN = ("pooler", "head")
"""Names of modules before the head that a checkpoint may lack: most masked language models come without BERT's pooler."""

_KIND = "ForSequenceClassification"
_NEW = "new_parameters"  # of a model: names of what its checkpoint did not have


def load_classifier(source: str | Path, classes: Sequence[str], settings: LoadSettings | None = None, *, seed: int = 0) -> Loaded:
    """Loads a model with a head for these classes, or for one number.

    Args:
        source: Folder or hub id of an encoder, a decoder, or a model that already has the head.
        classes: Names of the classes; empty for regression.
        settings: Number type, device, and whether code from the folder may run.
        seed: Seed for a head that the checkpoint does not have. The global generators are not touched.

    Raises:
        ModelError: The model is missing, damaged or unsafe, its architecture has no such class, or its head is for other classes.
        InputError: The device does not exist.
    """
    settings = settings or LoadSettings()
    device = device_named(settings.device)
    folder = locate_by(source, settings)
    config = _config(folder, classes, settings)
    tensors, provenance = stored_tensors(folder), read_provenance(folder)
    check_checksums(folder, provenance)
    dtype = weights_dtype(tensors, settings.dtype)
    model, missing = _load(folder, config, dtype, trust_remote_code=settings.trust_remote_code)
    _begin(model, missing, seed)
    setattr(model, _NEW, frozenset(missing))
    check_finite(model, str(source))
    embedding: Any = model.get_input_embeddings()
    tokenizer = load_tokenizer(folder, embedding.weight.shape[0], trust_remote_code=settings.trust_remote_code)
    if model.config.pad_token_id is None and tokenizer is not None:  # decoders find the end of a row by it
        model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    return Loaded(model.eval(), tokenizer, str(source), fingerprint(model), provenance)


def load_trained_classifier(source: str | Path, settings: LoadSettings | None = None) -> Loaded:
    """Loads a model with its own head for labels and the classes that its config names.

    Args:
        source: A folder or a hub id.
        settings: Number type, device, and whether code from the folder may run.

    Raises:
        ModelError: As :func:`load_classifier`, or the model has no such head.
        InputError: The device does not exist.
    """
    settings = settings or LoadSettings()
    folder = locate_by(source, settings)
    config = _config(folder, None, settings)
    loaded = load_classifier(source, classes_in(config), settings)
    if getattr(loaded.model, _NEW):
        raise ModelError(f"'{source}' has no head for labels; train one with `regraft recover {source} --task classification --data FILE`")
    return loaded


def is_classifier_folder(folder: Path) -> bool:
    """Returns whether a folder's config declares a head for labels; a damaged config gives False and is reported by loading."""
    try:
        return any(name.endswith(_KIND) for name in read_object(folder / "config.json", ModelError)["architectures"])
    except (ModelError, KeyError, TypeError, AttributeError):
        return False


def is_classifier(model: nn.Module) -> bool:
    """Returns whether a model has a head for classification or regression."""
    return type(model).__name__.endswith(_KIND)


def classes_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the names of the classes that a model predicts; empty for regression."""
    return classes_in(model.config)


def classes_in(config: PreTrainedConfig) -> tuple[str, ...]:
    """Returns the names of a config's classes; empty for regression, which many configs declare only by having a single label."""
    names: Any = config.id2label or {}
    if config.problem_type == "regression" or len(names) == 1:
        return ()
    return tuple(str(names[index]) for index in sorted(names))


def named_classes(folder: Path, count: int) -> tuple[str, ...]:
    """Returns the class names of an adapter for labels from its record, or their numbers; PEFT's files do not name them.

    Args:
        folder: The adapter's folder.
        count: Number of outputs of its head; 1 means regression.

    Raises:
        ModelError: The record is damaged.
    """
    if count == 1:
        return ()
    provenance = read_provenance(folder)
    names = provenance.settings.get("classes") if provenance is not None else None
    return tuple(map(str, names)) if isinstance(names, list | tuple) and len(names) == count else tuple(map(str, range(count)))


def row_limit(model: nn.Module) -> int | None:
    """Returns the longest row of a model whose positions start after its padding id, as in RoBERTa; None for other models.

    The config of such a model states the size of the position table, whose entries up to the padding id belong to no token.
    """
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None
    ]
    return min((table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None), default=None)


def head_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of the layers that are new to a task and trained together with every adapter; none for other models."""
    if is_classifier(model):
        new = getattr(model, _NEW, frozenset[str]())
        yield from ((name, parameter) for name, parameter in model.named_parameters() if name in new or name.split(".")[0] in HEADS)


def head_modules(names: Iterable[str]) -> list[str]:
    """Returns the modules that hold these parameters of a head, as PEFT's ``modules_to_save`` names them.

    >>> head_modules(["classifier.out_proj.weight", "bert.pooler.dense.bias", "bert.pooler.dense.weight"])
    ['bert.pooler.dense', 'classifier']
    """
    return sorted({name.split(".")[0] if name.split(".")[0] in HEADS else name.rpartition(".")[0] for name in names})


def save_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    provenance: Provenance,
    card: str,
    *,
    replace: bool = False,
) -> Provenance:
    """Writes a folder that ``AutoModelForSequenceClassification.from_pretrained`` loads; after an error nothing is left behind.

    Args:
        model: The model with its head.
        tokenizer: Tokenizer to save with the model, or None.
        folder: The folder to write.
        provenance: How the model came to be; written with the checksums of the weight files.
        card: Start of the model card; how to load the model is added.
        replace: Whether an existing folder is replaced.

    Returns:
        The provenance as it was written.

    Raises:
        OutputError: The folder exists or cannot be written; what was there before is untouched.
    """
    lines = [
        "from transformers import AutoModelForSequenceClassification",
        "",
        "model = AutoModelForSequenceClassification.from_pretrained(FOLDER)",
    ]
    how = "\n".join(["## How to load it", "", f"It is a plain `{type(model).__name__}`.", "", "```python", *lines, "```", ""])
    card = card.replace("pipeline_tag: text-generation", "pipeline_tag: text-classification", 1)
    with atomic_folder(Path(folder), replace=replace) as partial:
        with quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for file in weight_files(partial):
            file.chmod((partial / "config.json").stat().st_mode)
        return write_folder(partial, provenance, card.rstrip() + "\n\n" + how)


def _config(folder: Path, classes: Sequence[str] | None, settings: LoadSettings) -> PreTrainedConfig:
    """Returns the config of a model folder, changed to these classes; with None unchanged."""
    check_is_model(folder, settings.base)
    path = folder / "config.json"
    kind = read_object(path, ModelError).get("model_type")
    if kind not in ARCHITECTURES and not settings.trust_remote_code:
        raise ModelError(f"'{folder}': transformers has no model for sequence classification of type '{shown(kind)}'; use another model")
    config = read_config(folder, trust_remote_code=settings.trust_remote_code)
    if classes is None:
        if config.problem_type == "multi_label_classification":
            raise ModelError(f"'{folder}' gives several labels to a row, which is not measured here; use a model for one label")
        return config
    config.problem_type = "single_label_classification" if classes else "regression"
    names = tuple(classes) or ("score",)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return config


def _load(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool) -> tuple[PreTrainedModel, list[str]]:
    """Returns a model and the names of the parameters that its checkpoint does not have."""
    with torch.random.fork_rng():  # a new head is drawn here, and drawn again from the seed later
        model, report = checkpoint_as(AutoModelForSequenceClassification, folder, config, dtype, trust_remote_code=trust_remote_code)
    for name, stored, wanted in sorted(report["mismatched_keys"], key=str):
        remedy = "train a model without that head" if name.split(".")[0] in HEADS else "use the config and the weights of the same model"
        raise ModelError(f"'{folder}': '{name}' is {list(stored)} in the weights, and {list(wanted)} are needed; {remedy}")
    missing = sorted(report["missing_keys"])
    for name in missing:
        if not {*HEADS, *BETWEEN} & set(name.split(".")):
            raise ModelError(f"'{folder}': the weights lack '{name}', which '{type(model).__name__}' needs; use a checkpoint that has it")
    return model, missing


@torch.no_grad()
def _begin(model: PreTrainedModel, missing: Sequence[str], seed: int) -> None:
    """Initializes a new head: weights as the architecture draws them, from a separate generator; biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in missing:
        values = torch.full(parameters[name].shape, 0.0 if name.endswith("bias") else 1.0)
        if values.ndim > 1:
            values.normal_(0.0, float(getattr(model.config, "initializer_range", 0.02)), generator=generator)
        parameters[name].copy_(values)
