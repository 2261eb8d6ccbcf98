from __future__ import annotations

import json

from regraft import seedling
from regraft.atomic import sha256_of


def test_the_embedded_model_is_as_it_was_sealed() -> None:
    """After a new export, run ``scripts/seal_seedling.py``."""
    folder = seedling.path()
    sealed = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= sealed.keys()
    assert {name: sha256_of(folder / name) for name in sealed} == sealed
