"""Moments of a model's layers in a folder, so that another ratio, another method or a second run reads no calibration text again.

One folder below the cache is for one model and one set of calibration windows, by the contents of both. Each tensor that layers read has a
file, and each layer a file of its gradients, which also depend on the seed of the draws. What is damaged or missing is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.atomic import atomic_file, write_text
from regraft.compression.contract import Evidence, LooksAt
from regraft.errors import OutputError
from regraft.numerics.moments import Moments
from regraft.numerics.pooled import PooledMoments
from regraft.reading import check_ordinary, read_object

VERSION = 1
_INDEX = "moments.json"


class SavedMoments:
    """Moments of one model on one set of windows.

    Args:
        cache: The folder that the user named; it is made with the first file.
        made_from: What the moments follow from: fingerprint of the model, checksum of the windows.
        seed: Seed of the tokens drawn from predictions, which only the gradients follow from.

    Raises:
        OutputError: The path is a file.
    """

    def __init__(self, cache: Path, made_from: Mapping[str, Any], seed: int) -> None:
        if cache.exists() and not cache.is_dir():
            raise OutputError(f"cache '{cache}' is a file; name a folder")
        self._made_from = {"version": VERSION, **made_from}
        mark = json.dumps(self._made_from, sort_keys=True)
        self.folder = cache / f"moments-{hashlib.sha256(mark.encode()).hexdigest()[:24]}"
        self._seed = seed
        self._reads = self._read_index()
        self._last: tuple[str, PooledMoments] | None = None  # layers that read one tensor follow one another
        self._written: tuple[int, str] | None = None

    def has(self, name: str, looks_at: LooksAt) -> bool:
        """Returns whether there are files for a layer; they may still turn out to be damaged."""
        reader = self._reads.get(name)
        wanted = [] if reader is None else [self._path("inputs", reader)]
        if looks_at == "gradients":
            wanted.append(self._path(f"gradients-{self._seed}", name))
        return reader is not None and all(path.is_file() for path in wanted)

    def find(self, name: str, weight_OI: Tensor, looks_at: LooksAt) -> Evidence | None:
        """Returns the evidence of a layer, or None where some of it is not there or damaged."""
        rows, columns = weight_OI.shape
        reader = self._reads.get(name)
        if reader is None:
            return None
        inputs = self._inputs(reader, columns)
        gradients = self._gradients(name, rows) if looks_at == "gradients" else None
        if inputs is None or (looks_at == "gradients" and gradients is None):
            return None
        return Evidence(name, weight_OI, inputs, gradients)

    def keep(self, evidence: Evidence) -> None:
        """Writes the evidence of a layer; what it reads with the layer before is written once.

        Raises:
            OutputError: The folder cannot be written.
        """
        inputs, gradients = evidence.inputs, evidence.gradients
        if inputs is None:
            return
        if self._written is None or self._written[0] != id(inputs):
            self._written = (id(inputs), evidence.name)
            tensors = {"counts": inputs.counts_G, "totals": inputs.totals_GD, "absolute": inputs.absolute_D, "square": inputs.square_DD}
            self._write(self._path("inputs", evidence.name), tensors)
        if gradients is not None:
            tensors = {"count": torch.tensor(gradients.count), "total": gradients.total_D, "square": gradients.square_DD}
            self._write(self._path(f"gradients-{self._seed}", evidence.name), tensors)
        self._reads[evidence.name] = self._written[1]
        write_text(self.folder / _INDEX, json.dumps({"made_from": self._made_from, "reads": self._reads}, indent=1) + "\n")

    def _inputs(self, reader: str, width: int) -> PooledMoments | None:
        if self._last is not None and self._last[0] == reader:
            return self._last[1]
        found = _read(self._path("inputs", reader), {"absolute": (width,), "square": (width, width)})
        if found is None or not {"counts", "totals"} <= found.keys():
            return None
        self._last = (reader, PooledMoments(found["counts"], found["totals"], found["absolute"], found["square"]))
        return self._last[1]

    def _gradients(self, name: str, width: int) -> Moments | None:
        found = _read(self._path(f"gradients-{self._seed}", name), {"count": (), "total": (width,), "square": (width, width)})
        return None if found is None else Moments(int(found["count"]), found["total"], found["square"])

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / f"{name}.{kind}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        with atomic_file(path) as partial:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, partial)

    def _read_index(self) -> dict[str, str]:
        try:
            index = read_object(self.folder / _INDEX, OutputError)
            return {str(name): str(reader) for name, reader in index["reads"].items()} if index["made_from"] == self._made_from else {}
        except (OutputError, KeyError, AttributeError):
            return {}


def remembered(
    saved: SavedMoments | None,
    weights: Mapping[str, Callable[[], Tensor]],
    looks_at: LooksAt,
    gather: Callable[[Sequence[str]], Iterator[Evidence]],
) -> Iterator[Evidence]:
    """Yields the evidence of every layer: what is in the folder first, then what is gathered, which is kept there.

    Args:
        saved: The folder; None for none.
        weights: Returns the weight, (out, in), of every layer by name, in the order of the model.
        looks_at: Evidence that is needed in addition to the weights.
        gather: Yields the evidence of the layers that it is given.
    """
    if saved is None or looks_at == "weights":
        yield from gather(list(weights))
        return
    missing: list[str] = []
    for name, weight in weights.items():
        found = saved.find(name, weight(), looks_at) if saved.has(name, looks_at) else None
        if found is None:
            missing.append(name)
        else:
            yield found
    for one in gather(missing) if missing else ():
        saved.keep(one)
        yield one


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Returns the tensors of a file, or None where it is not there, damaged, or of other shapes."""
    try:
        check_ordinary(path, OutputError)
        found = load_file(path)
    except (OSError, OutputError, SafetensorError):
        return None
    whole = all(key in found and tuple(found[key].shape) == shape for key, shape in shapes.items())
    return found if whole and all(bool(torch.isfinite(value).all()) for value in found.values()) else None
