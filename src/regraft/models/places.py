"""Where the model is that something was made from: by the name that was given, beside what was made from it, or where it once lay."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.claims import output_of
from regraft.reading import is_folder

NAME, ABSOLUTE, RELATIVE = "name", "absolute", "relative"


def places_of(source: str, folder: Path, opened: str | None = None) -> dict[str, str]:
    """Returns how a model can be found again from any working directory: its name and, for a folder here, two paths to it.

    Args:
        source: The model, as its users name it.
        folder: What is made from it; a folder in a work folder counts as the output that it becomes.
        opened: The folder that was loaded. Where ``source`` leads elsewhere from here, there are no paths.
    """
    if not source or not is_folder(Path(source)) or (opened and not (is_folder(Path(opened)) and os.path.samefile(source, opened))):
        return {NAME: source}
    final = folder
    while (outer := output_of(final)) != final:
        final = outer
    absolute = os.path.realpath(source)
    return {NAME: source, ABSOLUTE: absolute, RELATIVE: os.path.relpath(absolute, os.path.realpath(final))}


def where_it_may_be(named: str, folder: Path | None, recorded: Mapping[str, Any] | None = None) -> list[str]:
    """Returns the folders that may hold a model, the likeliest first; the name alone where there is none.

    Args:
        named: The model, as its users name it.
        folder: What was made from it; None where that is in memory.
        recorded: What :func:`places_of` returned then.
    """
    said = {key: value for key, value in (recorded or {}).items() if isinstance(value, str) and "\0" not in value}
    beside = [folder / path for path in (named, said.get(RELATIVE)) if folder is not None and path]
    paths = [Path(named), *beside, *([Path(said[ABSOLUTE])] if ABSOLUTE in said else [])]
    found = {os.path.realpath(path): str(path) for path in reversed(paths) if is_folder(path)}
    return list(reversed(found.values())) or [named]
