"""The embedded default model: a small Llama, trained on text that every Python installation contains.

>>> from regraft import seedling
>>> (seedling.path() / "config.json").is_file()
True
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from regraft.errors import ModelError


def path() -> Path:
    """Returns the folder of the model: safetensors, config, tokenizer, model card and training log.

    Raises:
        ModelError: The package is not unpacked on disk (a zip), or was built without the model.
    """
    folder = Path(str(files(__name__)))
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"seedling has no weights at {folder}: install regraft from a wheel, unpacked, or give a model folder of your own")
    return folder
