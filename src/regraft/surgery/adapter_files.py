"""Files of an adapter of regraft (the *compact master*): only tensors that cannot be recomputed, as safetensors and JSON.

``adapter.json`` holds the method, its options, the base model with its fingerprint, and the rank, alpha, dropout and seed of every module;
``adapter.safetensors`` holds the tensors. The file names differ from PEFT's on purpose: PEFT reports that such a folder has no adapter,
whereas with its own names it would silently drop tensors that it does not know. ``regraft export`` writes adapters for PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft.adapters.contract import Delta
from regraft.atomic import sha256_of
from regraft.errors import ModelError, shown
from regraft.models.classifier import head_parameters
from regraft.models.view import digest_of, fingerprint_of
from regraft.models.weights import read_tensors
from regraft.reading import read_object, real_number, whole_number

DESCRIPTION = "adapter.json"
TENSORS = "adapter.safetensors"
FORMAT, VERSION = "regraft adapter", 1
_HEAD, _BETWEEN = "head", "::"


@dataclass(frozen=True)
class Master:
    """An adapter to be written.

    Attributes:
        method: Name of the method in the registry.
        base: Base model, as its users name it.
        base_fingerprint: Fingerprint of the base model.
        deltas: Module name to its adapter.
        head: Trained parameters of a classification or regression head; empty without one.
        classes: Names of the classes of the head; empty for regression.
    """

    method: str
    base: str
    base_fingerprint: str
    deltas: Mapping[str, Delta]
    head: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stored:
    """An adapter as read from its files.

    Attributes:
        method: Name of the method in the registry.
        base: Base model, as its users name it.
        base_fingerprint: Fingerprint of the base model.
        options: Options of the method, as plain JSON types.
        modules: Module name to rank, alpha, dropout and seed.
        tensors: Module name to the stored tensors.
        head: Parameters of a classification or regression head; empty without one.
        classes: Names of the classes of the head; empty for regression.
    """

    method: str
    base: str
    base_fingerprint: str
    options: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Tensor]]
    head: Mapping[str, Tensor]
    classes: tuple[str, ...]


def write_master(folder: Path, master: Master) -> None:
    """Writes the two files into an empty folder; equal adapters give equal bytes."""
    tensors = {
        f"{name}{_BETWEEN}{key}": value.detach().to("cpu").contiguous()
        for name, delta in master.deltas.items()
        for key, value in delta.stored().items()
    }
    tensors |= {f"{_HEAD}{_BETWEEN}{name}": value.detach().to("cpu").contiguous() for name, value in master.head.items()}
    save_file(dict(sorted(tensors.items())), folder / TENSORS)
    specs = {name: delta.spec for name, delta in master.deltas.items()}
    first = next(iter(specs.values()), None)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "method": master.method,
        "base": master.base,
        "base_fingerprint": master.base_fingerprint,
        "options": first.options.model_dump(mode="json") if first is not None else {},
        "classes": list(master.classes),
        "sha256": sha256_of(folder / TENSORS),
        "modules": {name: {key: getattr(spec, key) for key in ("rank", "alpha", "dropout", "seed")} for name, spec in specs.items()},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def is_master(folder: Path) -> bool:
    """Returns whether a folder holds a compact master."""
    return (folder / DESCRIPTION).is_file()


def read_master(folder: Path) -> Stored:
    """Reads a compact master.

    Raises:
        ModelError: A file is missing, damaged, or of a later version.
    """
    path = folder / DESCRIPTION
    try:
        values = read_object(path, ModelError)
        if values["format"] != FORMAT or values["version"] > VERSION:
            raise ModelError(f"'{path}' is of format {values['format']!r} {values['version']}, this regraft reads {VERSION}; update it")
        if sha256_of(folder / TENSORS) != values["sha256"]:
            raise ModelError(f"'{folder / TENSORS}' is not the file that was saved (its checksum differs); copy the adapter again")
        flat = read_tensors(folder / TENSORS)
        for name, spec in values["modules"].items():
            where = f"'{path}': {shown(name)}"
            whole_number(spec["rank"], f"{where}: rank", 1, 10**6, ModelError)
            real_number(spec["alpha"], f"{where}: alpha", 0.0, 1e9, ModelError)
            whole_number(spec["seed"], f"{where}: seed", 0, 2**64 - 1, ModelError)
            real_number(spec["dropout"] + 1.0, f"{where}: dropout and 1,", 0.99, 1.9999, ModelError)
        parts: dict[str, dict[str, Tensor]] = {_HEAD: {}} | {name: {} for name in values["modules"]}
        for key, tensor in flat.items():
            name, _, rest = key.partition(_BETWEEN)
            parts[name][rest] = _finite(tensor, key, folder)
        return Stored(
            method=str(values["method"]),
            base=str(values["base"]),
            base_fingerprint=str(values["base_fingerprint"]),
            options=dict(values["options"]),
            modules={name: dict(entry) for name, entry in values["modules"].items()},
            head=parts.pop(_HEAD),
            classes=tuple(str(name) for name in values.get("classes", ())),
            tensors=parts,
        )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"the adapter '{folder}' is damaged ({type(error).__name__}: {error}); copy it again") from None


def base_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the names, shapes and values of a model without its adapters and its classification head.

    Values are hashed in bfloat16, so that a model loaded in another dtype counts as the same base.
    """
    heads = {name for name, _ in head_parameters(model)}
    return fingerprint_of(
        (name.replace(".base.", "."), tuple(parameter.shape), torch.bfloat16, digest_of(parameter.to(torch.bfloat16)))
        for name, parameter in model.named_parameters()
        if ".deltas." not in name and name not in heads
    )


def _finite(tensor: Tensor, name: str, folder: Path) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"'{folder}': '{name}' holds NaN or infinity; the training diverged: use another adapter")
    return tensor
