"""Draws the picture of the README, and its table, from the results of a finished quick start.

    python scripts/make_picture.py runs/quickstart

Writes ``docs/quickstart.svg`` and the part of ``README.md`` below ``<!-- quickstart -->``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COLOURS = {"dense": "#4c6a92", "pruned": "#b5533c", "recovered": "#4f8a5b"}
LEFT, TOP, BAR, GAP, WIDTH = 92, 44, 26, 12, 640


def picture(results: dict[str, dict[str, Any]]) -> str:
    """Returns the SVG: one bar of held-out loss for each model, with its number of parameters."""
    longest = max(entry["loss_nats"] for entry in results.values())
    scale = (WIDTH - LEFT - 210) / longest
    rows: list[str] = []
    for index, (label, entry) in enumerate(results.items()):
        y = TOP + index * (BAR + GAP)
        length = entry["loss_nats"] * scale
        said = f"{entry['loss_nats']:.3f} nats, {entry['parameters'] / 1e6:.2f} M parameters"
        rows += [
            f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end">{label}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3" fill="{COLOURS[label]}"/>',
            f'<text x="{LEFT + length + 8:.1f}" y="{y + 18}">{said}</text>',
        ]
    height = TOP + len(results) * (BAR + GAP) + 8
    style = "font: 14px system-ui, sans-serif; fill: #222"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<rect width="100%" height="100%" fill="#fff"/><g style="{style}">'
        f'<text x="{LEFT}" y="26" font-weight="600">seedling: held-out loss per token</text>{"".join(rows)}</g></svg>\n'
    )


def words(results: dict[str, dict[str, Any]]) -> str:
    """Returns the table and the sentence under the picture."""
    dense, pruned, recovered = (results[label] for label in COLOURS)
    lines = ["| | parameters | MACs per token | bytes on disk | held-out loss (nats) | bits per byte |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {label} | {entry['parameters']:,} | {entry['macs_per_token']:,} | {entry['bytes_on_disk']:,} | {entry['loss_nats']:.4f} "
        f"| {entry['bits_per_byte']:.4f} |"
        for label, entry in results.items()
    ]
    cost = pruned["loss_nats"] - dense["loss_nats"]
    won = pruned["loss_nats"] - recovered["loss_nats"]
    return "\n".join(
        [
            *lines,
            "",
            f"Pruning {1 - pruned['parameters'] / dense['parameters']:.1%} of all parameters cost {cost:.3f} nats; recovery won back "
            f"{won / cost:.0%} of them. Measured on {dense['tokens']:,} tokens of held-out files, windows of "
            f"{dense['window_tokens']} tokens, stride {dense['stride_tokens']}, one seed.",
        ]
    )


def main() -> None:
    """Reads the run folder named on the command line and writes picture and table."""
    results = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    results = {label: results[label] for label in COLOURS}
    (ROOT / "docs" / "quickstart.svg").write_text(picture(results), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    marked = re.compile(r"(<!-- quickstart -->\n).*?(\n## )", re.DOTALL)
    image = "![Held-out loss of the dense, the pruned and the recovered model](docs/quickstart.svg)"
    assert marked.search(text), "README.md has lost its mark"
    readme.write_text(marked.sub(lambda found: f"{found[1]}\n{image}\n\n{words(results)}\n{found[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
