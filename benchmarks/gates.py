"""Gates beside the knapsack where much goes: held-out loss of both at 40 and 50 %, from the same calibration draws.

    python benchmarks/gates.py [--effort quick] [--reconstruct none] [--seeds 3] [--ratios 0.4 0.5]

Model and text are those of ``benchmarks/pruning.py``. Rows go to ``results/gates.csv``; a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, add_row, interval, machine, read_rows, table, versions
from pruning import Bench, Clock

FILE = RESULTS / "gates.csv"
SELECTORS = ("knapsack", "gates")


def measure(bench: Bench, effort: str, refit: str, ratio: float, seed: int, selector: str) -> None:
    """Adds one row, unless it is there."""
    key = {"model": bench.name, "effort": effort, "reconstruct": refit, "ratio": f"{ratio:g}", "seed": str(seed), "select": selector}
    if any(key.items() <= row.items() for row in read_rows(FILE)):
        return
    before = time.process_time()
    model = bench.ours(ratio, {"select": selector, "effort": effort, "reconstruct": refit}, seed)
    seconds = time.process_time() - before
    add_row(FILE, key | {"loss_nats": f"{bench.loss(model):.5f}", "processor_seconds": f"{seconds:.1f}"})


def page(bench: Bench) -> list[str]:
    """Returns the table: losses over the dense model's, and the paired difference."""
    rows: list[dict[str, Any]] = read_rows(FILE)
    body: list[list[str]] = []
    for kind in dict.fromkeys((row["effort"], row["reconstruct"], row["ratio"]) for row in rows):
        here = {(row["select"], row["seed"]): row for row in rows if (row["effort"], row["reconstruct"], row["ratio"]) == kind}
        seeds = sorted({seed for _, seed in here if all((name, seed) in here for name in SELECTORS)})
        if not seeds:
            continue
        lost = {name: [float(here[name, seed]["loss_nats"]) - bench.dense_nats for seed in seeds] for name in SELECTORS}
        mean, half = interval([gates - knapsack for knapsack, gates in zip(lost["knapsack"], lost["gates"], strict=True)])
        costs = [sum(float(here[name, seed]["processor_seconds"]) for seed in seeds) / len(seeds) for name in SELECTORS]
        shown = [f"{sum(lost[name]) / len(seeds):.3f}" for name in SELECTORS]
        body.append(
            [
                *kind[:2],
                f"{float(kind[2]):.0%}",
                *shown,
                f"{mean:+.3f}" + (f" ± {half:.3f}" if half == half else ""),
                *(f"{cost:.0f}" for cost in costs),
                str(len(seeds)),
            ]
        )
    head = ["effort", "re-fit", "removed", "knapsack", "gates", "difference", "knapsack, processor s", "gates, processor s", "draws"]
    return [
        "# Gates beside the knapsack",
        "",
        f"{bench.name}, per layer: nats a token over the dense model on held-out text. Differences are paired by the calibration draw, with 95 %",
        f"intervals; below 0 gates are better. {machine()}; {versions('torch', 'transformers', 'regraft')}.",
        "",
        *table(head, body),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--effort", action="append", choices=("quick", "default", "thorough"))
    parser.add_argument("--reconstruct", action="append", choices=("auto", "least_squares", "none"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.5])
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked.work, Clock(None))
    for effort, refit in product(asked.effort or ["quick"], asked.reconstruct or ["auto"]):
        for seed in range(asked.seeds):
            for ratio in asked.ratios:
                for selector in SELECTORS:
                    measure(bench, effort, refit, ratio, seed, selector)
    FILE.with_suffix(".md").write_text("\n".join(page(bench)), encoding="utf-8")


if __name__ == "__main__":
    main()
