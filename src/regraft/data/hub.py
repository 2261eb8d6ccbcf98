"""Rows of Parquet files, of saved data sets and of data sets on the Hugging Face hub, by the package ``datasets``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regraft.errors import DataError, InputError, MissingDependencyError

HUB = "hf:"
PARQUET = ".parquet"
# What ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` leave in a folder.
_SAVED = ("dataset_info.json", "dataset_dict.json")
_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(#(?P<split>[\w.\[\]:%-]+))?")


def is_dataset(source: Path | str) -> bool:
    """Returns whether a source is read by ``datasets``: ``hf:NAME``, a Parquet file, or a folder that ``save_to_disk`` wrote."""
    name = str(source)
    saved = any(os.path.isfile(os.path.join(name, part)) for part in _SAVED)
    return name.startswith(HUB) or name.lower().endswith(PARQUET) or saved


def dataset_rows(source: Path | str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a data set, each with its place for messages.

    Args:
        source: ``hf:NAME[:CONFIG][#SPLIT]`` (split: ``train``), a Parquet file, or a folder that ``save_to_disk`` wrote.

    Raises:
        DataError: The source cannot be read, or holds several splits and none is named ``train``.
        InputError: The name is malformed.
        MissingDependencyError: ``datasets`` is not installed.
    """
    datasets = _package()
    path = Path(source)
    name = str(source)
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # datasets logs what it raises, too
    try:
        if name.startswith(HUB):
            found = _from_hub(datasets, name)
        elif path.suffix.lower() == PARQUET:
            if not path.is_file():
                raise DataError(f"'{path}' does not exist or is no file; give the path of a Parquet file")
            found = datasets.Dataset.from_parquet(str(path), cache_dir=None, keep_in_memory=True)
        else:
            found = datasets.load_from_disk(str(path))
    except (DataError, InputError):
        raise
    except Exception as error:  # pyarrow, fsspec and the hub's client each have kinds of their own
        raise DataError(f"'{name}' cannot be read as a data set: {_first_line(error)}; check the name or the file") from None
    finally:
        logging.disable(disabled)
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(f"'{name}' has the splits {', '.join(found)}, and none is 'train'; give the folder of one split")
        found = found["train"]
    for number, row in enumerate(found, 1):
        yield f"row {number}", row


def _from_hub(datasets: Any, name: str) -> Any:
    match = _NAME.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise InputError(f"'{name}' names no data set of the hub; write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME#SPLIT")
    return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")


def _package() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError("datasets", "data") from None
    return datasets


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
