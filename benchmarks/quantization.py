"""Quantization beside pruning: bytes, loss and speed of a dense and a pruned model in several number types of GGUF.

    python benchmarks/quantization.py --model FOLDER --calibration TRAIN.txt --text TEST.txt [--speed]

The pruned model is cut with `effort=quick` (equal layers, feed-forward widths that divide into blocks of 256) and not recovered. The loss
is that of the file: it is read back, dequantised, and evaluated in torch. `--speed` adds tokens per second in llama.cpp, the fastest of
interleaved runs; it says nothing on a machine that does other work.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import add_row, machine, read_rows, table, versions, write_rows
from regraft.models.load import load
from regraft.pipelines.evaluate import evaluate_model
from regraft.pipelines.export import export
from regraft.pipelines.prune.prune import prune
from regraft.settings import EvaluateSettings, ExportSettings, PruneSettings
from serving import timings

KINDS = ("F16", "Q8_0", "Q4_K_M")


def main() -> None:
    """Measures and writes ``quantization.csv`` and ``quantization.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the text that are evaluated")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--work", type=Path, default=None, help="folder for models and files, kept; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = arguments.work or Path(place)
        variants = {"dense": arguments.model, f"{arguments.ratio:.0%} pruned": str(pruned(arguments, work))}
        files = {(name, kind): written(source, kind, arguments.calibration, work) for name, source in variants.items() for kind in KINDS}
        csv = arguments.output / "quantization.csv"
        if not arguments.speed:
            csv.unlink(missing_ok=True)
            for (name, kind), file in files.items():
                add_row(csv, row_of(name, kind, file, arguments))
        else:
            write_rows(csv, with_speeds(read_rows(csv), files, arguments.runs))
    write_page(arguments.output / "quantization.md", read_rows(csv), arguments)


def pruned(arguments: argparse.Namespace, work: Path) -> Path:
    """Returns the folder of the pruned model, which is made once."""
    folder = work / "pruned"
    if not (folder / "config.json").is_file():
        settings = PruneSettings(
            ratio=arguments.ratio, effort="quick", shape="uniform", targets=("ffn",), align=256, calibration=arguments.calibration
        )
        prune(arguments.model, folder, settings)
    return folder


def written(source: str, kind: str, calibration: Path, work: Path) -> Path:
    """Returns the GGUF file of a model in one number type, which is made once."""
    folder = work / f"{Path(source).name}-{kind}"
    if not (folder / "model.gguf").is_file():
        importance = calibration if kind.endswith("_M") else None
        export(source, folder, "gguf", settings=ExportSettings(quantize=kind, importance=importance), check=None)
    return folder / "model.gguf"


def row_of(name: str, kind: str, file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns bytes and loss of one file."""
    settings = EvaluateSettings(window=512, max_tokens=arguments.tokens)
    measured = evaluate_model(str(file), settings, text=arguments.text)
    row: dict[str, Any] = {"model": Path(arguments.model).name, "variant": name, "type": kind, "bytes": file.stat().st_size}
    row |= {"loss": round(measured.loss.loss_nats, 4), "tokens": arguments.tokens, "prefill": "", "decode": "", "runs": ""}
    return row | {"machine": machine(), "versions": versions("torch", "transformers", "gguf", "xllamacpp")}


def with_speeds(rows: list[dict[str, str]], files: dict[tuple[str, str], Path], runs: int) -> list[dict[str, str]]:
    """Returns the rows with tokens per second of reading and writing."""
    speeds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in files}
    vocabulary = load(str(next(iter(files.values())))).model.get_input_embeddings().get_parameter("weight").shape[0]
    for run in range(runs):
        for key, file in files.items():
            speeds[key].append(timings(file, vocabulary, run))
    for row in rows:
        reading, writing = (max(column) for column in zip(*speeds[row["variant"], row["type"]], strict=True))
        row |= {"prefill": f"{reading:.1f}", "decode": f"{writing:.1f}", "runs": str(runs)}
    return rows


def write_page(path: Path, rows: list[dict[str, str]], arguments: argparse.Namespace) -> None:
    """Writes the table, every file beside the dense one in F16."""
    base = rows[0]
    lines = [
        f"# Quantization beside pruning: {base['model']}",
        "",
        f"`benchmarks/quantization.py`: loss in nats a token on {base['tokens']} tokens of {arguments.text.stem}; the pruned model has "
        f"equal layers, feed-forward networks cut, `effort=quick`, not recovered. {base['machine']}; {base['versions']}.",
        "",
    ]
    body: list[list[str]] = []
    for row in rows:
        speeds = [
            f"{float(row[key]) / float(base[key]):.2f} x" if row[key] and base[key] else "not measured" for key in ("prefill", "decode")
        ]
        share = f"{int(row['bytes']) / 1e6:.1f} ({int(row['bytes']) / int(base['bytes']):.0%})"
        body.append([row["variant"], row["type"], share, f"{float(row['loss']):.3f}", *speeds])
    head = ("variant", "type", "MB", "loss", "prefill", "decode")
    path.write_text("\n".join([*lines, *table(head, body), ""]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
