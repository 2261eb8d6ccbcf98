"""The record of how a model folder came to be: reading, extending and writing it."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from regraft.errors import ModelError, PlanError
from regraft.plans import Provenance, from_json, to_dict, to_json
from regraft.reading import read_bytes

FILE = "regraft.json"
LIBRARIES = ("regraft", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
_NUMBERS = re.compile(r"\[\s+((?:-?[\d.eE+-]+,?\s*)+)\]")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of every library that affects the results of a run, by name."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_provenance(folder: Path) -> Provenance | None:
    """Returns the record of how a folder came to be, or None where regraft did not make it.

    Raises:
        ModelError: Its ``regraft.json`` cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return from_json(Provenance, read_bytes(path, ModelError))
    except PlanError as error:
        raise ModelError(f"'{path}' is damaged ({error}); copy the folder again, or remove that file to do without it") from None


def provenance_text(provenance: Provenance) -> str:
    """Returns the text of ``regraft.json``: indented, but with each list of numbers on one line."""
    return _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", to_json(provenance)) + "\n"


def parents_of(provenance: Provenance | None) -> tuple[dict[str, Any], ...]:
    """Returns the parents, oldest first, of a model that is made from one with this provenance."""
    if provenance is None:
        return ()
    own = {key: value for key, value in to_dict(provenance).items() if key != "parents"}
    return (*provenance.parents, own)
