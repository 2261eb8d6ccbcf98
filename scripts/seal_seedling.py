"""Writes ``checksums.json`` beside the embedded model, which ``regraft doctor`` compares the files with. Run it after every export."""

from __future__ import annotations

import json
from pathlib import Path

from regraft.atomic import sha256_of, write_text

FOLDER = Path(__file__).parents[1] / "src" / "regraft" / "seedling"
NAMES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    """Writes the SHA-256 of the files that the model is loaded from."""
    write_text(FOLDER / "checksums.json", json.dumps({name: sha256_of(FOLDER / name) for name in NAMES}, indent=1) + "\n")


if __name__ == "__main__":
    main()
