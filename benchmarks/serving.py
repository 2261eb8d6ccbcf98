"""Speed and size of exported models in llama.cpp: dense and pruned, uniform and uneven, in several number types.

    python benchmarks/serving.py --models ../shared/models/stories3M … --output benchmarks/results

For each model it prunes copies (magnitude, no calibration: quality is not the point here), exports each to GGUF, and times the runtime's own
counters: tokens per second of reading a prompt and of writing. Runs of the variants are interleaved, and the fastest of the runs is taken: on a
shared machine, whatever makes a run slower comes from outside. The speed-up stands beside the ratio of the operations of one token.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import add_row, machine, read_rows, table, versions
from regraft.evaluation.size import measure_size
from regraft.export.llama_cpp import Runtime
from regraft.models.load import load, locate
from regraft.pipelines.export import export
from regraft.pipelines.prune.prune import prune
from regraft.settings import ExportSettings, PruneSettings

PROMPT_TOKENS, NEW_TOKENS = 256, 64
VARIANTS: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("dense", None),
    ("20 % uniform", {"ratio": 0.2, "shape": "uniform"}),
    ("20 % uneven", {"ratio": 0.2, "shape": "per-layer", "select": "global"}),
    ("50 % uniform", {"ratio": 0.5, "shape": "uniform"}),
    ("50 % uneven", {"ratio": 0.5, "shape": "per-layer", "select": "global"}),
)


def timings(file: Path, vocabulary: int, seed: int) -> tuple[float, float]:
    """Returns tokens per second of reading and of writing, as llama.cpp counts them, on one thread."""
    prompt = [(index * 7 + seed * 13) % (vocabulary - 4) + 3 for index in range(PROMPT_TOKENS)]
    with Runtime(file, context=PROMPT_TOKENS + NEW_TOKENS + 8, threads=1) as runtime:
        question = {"n_predict": NEW_TOKENS, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        runtime.ask("/completion", question | {"prompt": prompt[:16]})
        answer = runtime.ask("/completion", question | {"prompt": prompt})["timings"]
    return float(answer["prompt_per_second"]), float(answer["predicted_per_second"])


def main() -> None:
    """Measures and writes ``serving.csv`` and ``serving.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0"])
    parser.add_argument("--variants", nargs="+", default=[name for name, _ in VARIANTS])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--note", default="", help="what else ran on the machine, for the page")
    arguments = parser.parse_args()
    csv = arguments.output / "serving.csv"
    with tempfile.TemporaryDirectory() as place:
        for model in arguments.models:
            measure(model, arguments, Path(place) / Path(model).stem, csv)
    write_page(arguments.output / "serving.md", read_rows(csv), arguments.note)


def measure(model: str, arguments: argparse.Namespace, place: Path, csv: Path) -> None:
    """Prunes, exports and times the variants of one model, and adds a row for each file."""
    files: dict[tuple[str, str], Path] = {}
    facts: dict[str, tuple[int, int, int]] = {}
    for name, cut in VARIANTS:
        if name not in arguments.variants:
            continue
        folder = place / name.replace(" ", "_").replace("%", "percent")
        if cut is not None:
            prune(model, folder, PruneSettings(criterion="l2", reconstruct="none", **cut))
        loaded = load(folder if cut is not None else model)
        size = measure_size(loaded.model, locate(folder if cut is not None else model), PROMPT_TOKENS)
        facts[name] = (size.parameters, size.macs_per_token, loaded.model.get_input_embeddings().get_parameter("weight").shape[0])
        for kind in arguments.types:
            export(loaded, place / f"{folder.name}-{kind}", "gguf", settings=ExportSettings(quantize=kind), check=None)
            files[name, kind] = place / f"{folder.name}-{kind}" / "model.gguf"
    measured: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in files}
    for run in range(arguments.runs):
        for key, file in files.items():
            measured[key].append(timings(file, facts[key[0]][2], run))
    for (name, kind), speeds in measured.items():
        reading, writing = (max(column) for column in zip(*speeds, strict=True))
        parameters, macs, _ = facts[name]
        row = {"model": Path(model).stem, "variant": name, "type": kind, "parameters": parameters, "macs": macs}
        row |= {"bytes": files[name, kind].stat().st_size, "prefill": round(reading, 1), "decode": round(writing, 1)}
        add_row(csv, row | {"runs": arguments.runs, "machine": machine(), "versions": versions("torch", "gguf", "xllamacpp")})


def write_page(path: Path, rows: list[dict[str, str]], note: str) -> None:
    """Writes the table, each variant beside the dense model of its type, and a note on what else ran on the machine."""
    dense = {(row["model"], row["type"]): row for row in rows if row["variant"] == "dense"}
    lines = [
        "# Serving in llama.cpp",
        "",
        f"`benchmarks/serving.py`: a prompt of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones, one thread.",
    ]
    lines += [f"{rows[0]['machine']}; {rows[0]['versions']}. The fastest of {rows[0]['runs']} interleaved runs. {note}", ""]
    body: list[list[str]] = []
    for row in rows:
        base = dense.get((row["model"], row["type"]), row)
        fewer = float(base["macs"]) / float(row["macs"])
        ratios = [float(row[key]) / float(base[key]) for key in ("prefill", "decode")]
        body.append(
            [
                row["model"],
                row["variant"],
                row["type"],
                f"{int(row['bytes']) / 1e6:.2f}",
                *(f"{float(row[key]):.0f} ({ratio:.2f} x)" for key, ratio in zip(("prefill", "decode"), ratios, strict=True)),
                f"{fewer:.2f} x",
            ]
        )
    head = ("model", "variant", "type", "MB", "prefill, tokens/s", "decode, tokens/s", "fewer operations")
    path.write_text("\n".join([*lines, *table(head, body), ""]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
