"""Depth against width: loss and measured speed of a model without whole layers, with and without a bridge, without width, and without both.

    python benchmarks/depth.py --model DIR --calibration FILE --held-out FILE[,FILE...] [--ratio 0.15,0.3] [--seeds 3] [--windows 400]

The held-out texts are given by the user and must be none of what the model is calibrated on; the loss of each is given over the dense model's.
Speed is that of a decoded token beside the dense model's in one run, medians of repeats in turns. Rows are appended to
``results/depth_NAME.csv``, an interrupted run goes on, and the table is drawn from the file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import regraft
from common import RESULTS, add_row, interval, machine, read_rows, rounded, table, versions
from regraft.data.text import Corpus, read_corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.evaluation.speed import compare_speed
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.settings import EvaluateSettings, LoadSettings, PruneSettings

WAYS: dict[str, dict[str, Any]] = {
    "width": {"targets": ("heads", "ffn"), "shape": "per-layer"},
    "depth, cut alone": {"targets": ("layers",), "shape": "per-layer", "reconstruct": "none"},
    "depth, bridge alone": {"targets": ("layers",), "shape": "per-layer", "reconstruct": "none", "bridge": True},
    "depth, re-fit to the predictions": {"targets": ("layers",), "shape": "per-layer"},
    "depth, bridge and re-fit": {"targets": ("layers",), "shape": "per-layer", "bridge": True},
    "both, bridge and re-fit": {"targets": ("heads", "ffn", "layers"), "shape": "per-layer", "bridge": True},
}


def texts(files: str) -> list[Corpus]:
    return [read_corpus(Path(file), "validation") for file in files.split(",")]


def losses(model: PreTrainedModel, loaded: Loaded, held_out: list[Corpus], windows: int) -> list[float]:
    settings = EvaluateSettings(window=128, max_tokens=windows * 64)
    return [evaluate_loss(model, require_tokenizer(loaded), corpus, settings).loss_nats for corpus in held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--ratio", default="0.15,0.3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    path = RESULTS / f"depth_{asked.model.name}.csv"
    loaded = load(str(asked.model), LoadSettings(dtype="float32"))
    held_out = texts(asked.held_out)
    names = [Path(file).stem for file in asked.held_out.split(",")]
    dense = losses(loaded.model, loaded, held_out, asked.windows)
    done = {(row["way"], row["ratio"], row["seed"]) for row in read_rows(path)}
    for seed in range(asked.seeds):
        for ratio in asked.ratio.split(","):
            for way, settings in WAYS.items():
                if (way, ratio, str(seed)) in done:
                    continue
                before = time.process_time()
                chosen = PruneSettings(ratio=float(ratio), calibration=asked.calibration, **settings)
                result = regraft.prune(loaded, settings=chosen, seed=seed)
                seconds = time.process_time() - before
                assert result.model is not None
                speed = compare_speed({"dense": loaded.model, "pruned": result.model}, 128, 32)
                over = [one - other for one, other in zip(losses(result.model, loaded, held_out, asked.windows), dense, strict=True)]
                row: dict[str, Any] = {"way": way, "ratio": ratio, "seed": seed, "removed": f"{result.plan.achieved:.4f}"}
                row |= {f"{name}, nats over dense": f"{value:.5f}" for name, value in zip(names, over, strict=True)}
                row |= {"decode, times dense": f"{speed['dense'].decode_seconds_per_token / speed['pruned'].decode_seconds_per_token:.3f}"}
                add_row(path, row | {"processor seconds": f"{seconds:.1f}"})
    draw(path, asked.model.name)


def draw(path: Path, name: str) -> None:
    """Draws the table of a file of rows."""
    rows = read_rows(path)
    columns = [column for column in rows[0] if column.endswith("over dense")]
    lines = [f"# Depth against width: {name}", "", f"{machine()}; {versions('torch', 'transformers', 'regraft')}", ""]
    lines += [
        "Means over calibration seeds with 95 % intervals, paired where seeds are equal. Speed: decoded tokens a second over the dense model's.",
        "",
    ]
    body: list[list[str]] = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        for way in dict.fromkeys(row["way"] for row in rows):
            here = [row for row in rows if (row["ratio"], row["way"]) == (ratio, way)]
            if not here:
                continue
            cells = [_mean([float(row[column]) for row in here]) for column in columns]
            speeds = sorted(float(row["decode, times dense"]) for row in here)
            removed = sum(float(row["removed"]) for row in here) / len(here)
            body.append([way, f"{removed:.1%}", *cells, rounded(speeds[len(speeds) // 2], 2), str(len(here))])
    lines += table(["what", "removed", *columns, "decode, times dense", "seeds"], body)
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _mean(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if half != half else f"{mean:.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
