"""The record and the card of every folder that regraft writes next to its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from regraft.atomic import sha256_of
from regraft.models.places import places_of
from regraft.models.provenance import FILE, provenance_text
from regraft.plans import Provenance

CARD = "README.md"
WEIGHTS = ("*.safetensors", "*.gguf")
FOUND_AT = "found_at"  # the setting of a record that finds the source again


def write_folder(partial: Path, provenance: Provenance, card: str | None, files: Mapping[str, str] | None = None) -> Provenance:
    """Writes the record, with the checksums of the weight files, and the card into a folder that holds everything else.

    Args:
        partial: A folder that gets its final name when it is whole.
        provenance: How the folder came to be.
        card: The whole text of ``README.md``; None where there is none, or where it is there already.
        files: SHA-256 of the weight files by name, where they are known already; default: computed.

    Returns:
        The record as it was written.
    """
    if files is None:
        files = {file.name: sha256_of(file) for pattern in WEIGHTS for file in sorted(partial.glob(pattern))}
    places = places_of(provenance.source, partial)
    found_at = {FOUND_AT: places} if len(places) > 1 else {}
    written = dataclasses.replace(provenance, files=files, settings={**provenance.settings, **found_at})
    (partial / FILE).write_text(provenance_text(written), encoding="utf-8")
    if card is not None:
        (partial / CARD).write_text(card.rstrip() + "\n", encoding="utf-8")
    return written
