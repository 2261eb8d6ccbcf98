"""Cache of scores and curves in a folder, so that another ratio needs no new calibration.

Each is a JSON file, named by the SHA-256 of its inputs: the model's fingerprint, the criterion with its settings, and the calibration
windows. The inputs are also in the file and are compared before the file is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from regraft.atomic import write_text
from regraft.errors import OutputError, PlanError
from regraft.plans import Curves, Groups, Scores, from_json, to_dict, to_json
from regraft.progress import Say
from regraft.reading import read_object

T = TypeVar("T", Scores, Curves)


def checksum_of(value: Tensor | Groups | Scores | None) -> str | None:
    """Returns the SHA-256 of a tensor's shape, dtype and values, or of a plan's JSON text; None for None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        values = value.detach().cpu().contiguous().numpy()
        return hashlib.sha256(f"{values.shape} {values.dtype} ".encode() + values.tobytes()).hexdigest()
    return hashlib.sha256(to_json(value, indent=None).encode()).hexdigest()


class ScoreCache:
    """A folder of scores and curves.

    Args:
        folder: Path of the folder, which is created with the first file.

    Raises:
        OutputError: The path is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"`cache` '{folder}' is a file; name a folder")
        self._folder = folder

    def get(self, kind: type[T], made_from: Mapping[str, Any], make: Callable[[], T], say: Say) -> T:
        """Returns a cached value, or computes and stores it.

        Args:
            kind: ``Scores`` or ``Curves``.
            made_from: All inputs of the value, as plain JSON types.
            make: Computes the value if it is not cached; a damaged file counts as not cached.
            say: Called with one line if the value was cached.

        Raises:
            OutputError: The file cannot be written.
        """
        made_from = {"kind": kind.__name__, **made_from}
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]
        path = self._folder / f"{kind.__name__.lower()}-{key}.json"
        kept = _read(kind, path, made_from)
        if kept is not None:
            say(f"{kind.__name__.lower()} taken from {path}")
            return kept
        made = make()
        write_text(path, json.dumps({"made_from": made_from, "value": to_dict(made)}) + "\n")
        return made


def _read(kind: type[T], path: Path, made_from: Mapping[str, Any]) -> T | None:
    try:
        entry = read_object(path, PlanError)
        return from_json(kind, json.dumps(entry["value"])) if entry["made_from"] == made_from else None
    except (OSError, ValueError, KeyError, TypeError, PlanError):
        return None
