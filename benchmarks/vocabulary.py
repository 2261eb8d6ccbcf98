"""What a smaller vocabulary costs and saves: nats per byte of texts that its tokens were not counted on, size of the files, tokens.

    python benchmarks/vocabulary.py MODEL [--shared ../shared] [--sizes 36864,24576,12288] [--budgets 0.1,0.2] [--bytes 12000] [--threads 1]

The tokens are counted on a mix of three kinds of text (encyclopaedia, stories, instructions), and each size is judged on held-out text of
each kind, ``--bytes`` of it. Losses are divided by bytes, not tokens, as a smaller vocabulary needs more tokens for the same text. Every row
is written as soon as it is there. Nothing is trained.

``--budgets`` prunes the model at the effort ``quick`` to shares of all its parameters, once with heads and channels alone and once with the
vocabulary in the same budget, calibrated on the same three texts.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from common import RESULTS, add_row, machine, read_rows, rounded, table, versions
from regraft.data.text import Corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.models.load import Loaded, load
from regraft.pipelines.prune.prune import prune

CSV = RESULTS / "vocabulary.csv"
BUDGETS = RESULTS / "vocabulary_budget.csv"
TARGETS = (("heads", "ffn"), ("heads", "ffn", "vocabulary"))
KINDS = ("encyclopaedia", "stories", "instructions")


def texts(shared: Path) -> dict[str, list[str]]:
    """Documents of each kind."""
    articles = (shared / "data/wikitext2/valid.txt").read_text(encoding="utf-8").split("\n = ")
    stories = (shared / "data/tinystories/train.txt").read_text(encoding="utf-8").split("<|endoftext|>")[:-1]
    records = json.loads((shared / "data/dolly/dolly_3k.json").read_text(encoding="utf-8"))
    instructions = ["\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part) for row in records]
    return dict(zip(KINDS, (articles, stories, instructions), strict=True))


def first_bytes(documents: Sequence[str], count: int) -> list[str]:
    """Whole documents from the first, until there are so many bytes; the last is cut."""
    found: list[str] = []
    for document in documents:
        left = count - sum(len(text.encode()) for text in found)
        if left <= 0:
            break
        found.append(document.encode()[:left].decode(errors="ignore"))
    return [text for text in found if text.strip()]


def losses(loaded: Loaded, held_out: dict[str, list[str]]) -> dict[str, float]:
    """Nats per byte and tokens per byte of each kind."""
    row: dict[str, float] = {}
    assert loaded.tokenizer is not None
    for kind, documents in held_out.items():
        loss = evaluate_loss(loaded.model, loaded.tokenizer, Corpus(kind, "held-out", tuple(documents)))
        row |= {f"{kind}_nats_per_byte": loss.bits_per_byte * math.log(2), f"{kind}_tokens_per_byte": loss.tokens / loss.bytes}
    return row


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of the weights and of the tokenizer."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"weights_bytes": weights, "tokenizer_bytes": (folder / "tokenizer.json").stat().st_size}


def budgets(
    model: Path, ratios: Sequence[float], counted: dict[str, list[str]], held_out: dict[str, list[str]], said: dict[str, object]
) -> None:
    """The vocabulary in one budget with heads and channels, beside these alone."""
    done = {(row["model"], row["targets"], row["ratio"]) for row in read_rows(BUDGETS)}
    with tempfile.TemporaryDirectory() as name:
        files = {kind: Path(name) / f"{kind}.txt" for kind in counted}
        for kind, documents in counted.items():
            files[kind].write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
        for ratio, targets in product(ratios, TARGETS):
            if (model.name, ", ".join(targets), f"{ratio:g}") in done:
                continue
            out = Path(name) / "model"
            text = ",".join(map(str, files.values()))
            prune(str(model), out, ratio=ratio, targets=targets, shape="per-layer", effort="quick", calibration=text)
            smaller = load(out)
            tokens = smaller.model.config.get_text_config().vocab_size
            row = {
                **said,
                "targets": ", ".join(targets),
                "ratio": f"{ratio:g}",
                "tokens": tokens,
                "parameters": smaller.model.num_parameters(),
            }
            add_row(BUDGETS, {**row, **losses(smaller, held_out), **sizes_of(out)})
            shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--sizes", default="36864,24576,12288")
    parser.add_argument("--budgets", default="", help="shares of all parameters")
    parser.add_argument("--bytes", type=int, default=12_000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    every = texts(given.shared)
    of_kinds = {kind: documents[len(documents) // 2 :] for kind, documents in every.items()}
    counted = [text for documents in of_kinds.values() for text in documents]
    held_out = {kind: first_bytes(documents[: len(documents) // 2], given.bytes) for kind, documents in every.items()}
    done = {(row["model"], row["tokens"]) for row in read_rows(CSV)}
    loaded = load(given.model)
    full = len(loaded.tokenizer.get_vocab()) if loaded.tokenizer is not None else 0
    common = {"model": given.model.name, "machine": machine(), "versions": versions("torch", "transformers", "tokenizers")}
    for size in (full, *map(int, given.sizes.split(","))):
        if (given.model.name, str(size)) in done:
            continue
        if size == full:
            parameters = loaded.model.num_parameters()
            row = {**losses(loaded, held_out), **sizes_of(given.model)}
        else:
            with tempfile.TemporaryDirectory() as name:
                out = Path(name) / "model"
                prune(str(given.model), out, targets=("vocabulary",), vocabulary_size=size, calibration=counted)
                smaller = load(out)
                parameters = smaller.model.num_parameters()
                row = {**losses(smaller, held_out), **sizes_of(out)}
        add_row(CSV, {**common, "tokens": size, "parameters": parameters, "bytes_judged": 3 * given.bytes, **row})
        write_table()
    said: dict[str, object] = {**common, "bytes_judged": 3 * given.bytes}
    budgets(given.model, [float(part) for part in given.budgets.split(",") if part], of_kinds, held_out, said)
    write_table()


def write_table() -> None:
    """Draws the table from the rows."""
    rows = read_rows(CSV)
    lines = ["# Vocabulary", "", "Written by `benchmarks/vocabulary.py`; do not edit by hand.", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        first = mine[0]
        lines += [
            f"## {model}",
            "",
            f"{first['machine']}; {first['versions']}; {int(first['bytes_judged']):,} bytes judged, nothing trained.",
            "",
        ]
        head = ["tokens", "parameters", "weights, MB", "tokenizer, MB"]
        head += [f"{kind}: {what}" for kind in KINDS for what in ("nats per byte", "tokens per byte")]
        body = [
            [
                f"{int(row['tokens']):,}",
                f"{int(row['parameters']):,}",
                rounded(int(row["weights_bytes"]) / 1e6, 1),
                rounded(int(row["tokenizer_bytes"]) / 1e6, 2),
                *(rounded(row[f"{kind}_{what}"], 4) for kind in KINDS for what in ("nats_per_byte", "tokens_per_byte")),
            ]
            for row in mine
        ]
        lines += [*table(head, body), ""]
        lines += _budget_lines([row for row in read_rows(BUDGETS) if row["model"] == model], first)
    (RESULTS / "vocabulary.md").write_text("\n".join(lines), encoding="utf-8")


def _budget_lines(rows: Sequence[dict[str, str]], dense: dict[str, str]) -> list[str]:
    """The rows of ``--budgets`` of one model, each beside the dense model."""
    if not rows:
        return []
    said = "Pruned to a share of all parameters at the effort `quick`, `--shape per-layer`, calibrated on the three texts; nats per byte over dense:"
    head = ["removed", "targets", "tokens", *KINDS, "mean"]
    body: list[list[str]] = []
    for row in rows:
        over = [float(row[f"{kind}_nats_per_byte"]) - float(dense[f"{kind}_nats_per_byte"]) for kind in KINDS]
        removed = 1.0 - int(row["parameters"]) / int(dense["parameters"])
        body.append(
            [f"{removed:.1%}", row["targets"], f"{int(row['tokens']):,}", *(rounded(one, 4) for one in (*over, sum(over) / len(over)))]
        )
    return [said, "", *table(head, body), ""]


if __name__ == "__main__":
    main()
