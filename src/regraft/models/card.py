"""The model card of a saved folder: its history, and how to load the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.errors import Markdown, in_code, in_markdown
from regraft.models.view import LayerSizes
from regraft.plans import Provenance

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_BAR = re.compile(r"(?<!\\)\|")  # would end a cell, in code too
TAGS = ("regraft", "pruning", "compression")


def model_card(provenance: Provenance, facts: Mapping[str, Any] | None = None) -> str:
    """Returns a model card in Markdown with the front matter that the Hugging Face hub reads.

    Args:
        provenance: Provenance of the model.
        facts: Further rows of the card: name to value in words, in order.
    """
    rows = {
        "made from": Markdown(f"{in_code(provenance.source)} (fingerprint {in_code(provenance.source_fingerprint)})"),
        "command": in_code(provenance.command),
        "seed": provenance.seed,
        **(facts or {}),
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.versions.items()),
    }
    title = Path(provenance.source).name or provenance.source
    return "\n".join(
        [
            *_front_matter(provenance.source),
            "",
            f"# {in_markdown(title)}, changed with regraft",
            "",
            "## What was done",
            "",
            *table(("", ""), [(name, value) for name, value in rows.items()]),
            "",
            "The complete plan, settings and checksums are in `regraft.json`.",
            "",
        ]
    )


def loading_section(model_class: str, *, uneven: bool) -> str:
    """Returns the section of a card about loading the model.

    Args:
        model_class: Name of the model's class.
        uneven: Whether the class is one of regraft's.
    """
    if uneven:
        words = (
            "Its layers have different sizes, which no stock class of transformers expresses. Load it after `import regraft`, or "
            "without regraft by letting the code in this folder run."
        )
        lines = [
            "import regraft",
            "from transformers import AutoModelForCausalLM",
            "",
            "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
            "# without regraft: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
        ]
    else:
        words = f"It is a plain `{model_class}` and loads wherever that does."
        lines = ["from transformers import AutoModelForCausalLM", "", "model = AutoModelForCausalLM.from_pretrained(FOLDER)"]
    return "\n".join(["## How to load it", "", words, "", "```python", *lines, "```", ""])


def sizes_section(sizes: Sequence[LayerSizes]) -> str:
    """Returns the section of a card with the sizes of the layers; equal neighbours share a row."""
    rows: list[tuple[Any, ...]] = []
    first = 0
    for index, layer in enumerate(sizes):
        if index + 1 == len(sizes) or sizes[index + 1] != layer:
            label = str(index) if first == index else f"{first} to {index}"
            rows.append((label, layer.query_heads, layer.kv_heads, layer.head_dim, layer.ffn))
            first = index + 1
    head = ("layers", "query heads", "key-value heads", "head size", "feed-forward width")
    return "\n".join(["## Sizes", "", *table(head, rows), ""])


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the lines of a Markdown table; cells are shown as they stand."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_BAR.sub(r"\|", in_markdown(cell)) for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *(line(row) for row in rows)]


def _front_matter(source: str) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        lines.append(f"base_model: {json.dumps(source)}")
    return [*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---"]
