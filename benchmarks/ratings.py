"""Completion of real ratings: held-out error over several random splits, beside four baselines, with paired intervals.

    python benchmarks/ratings.py [--ratings ../shared/data/movielens-small/ratings.csv] [--splits 5] [--rank 10]

Each split holds out a tenth of the ratings; ours and every baseline choose their strengths on a slice of the rest, by the code of
``regraft complete``. Differences are paired by split, with Student's interval of 95 %. Writes ``benchmarks/results/ratings.csv`` and
``.md``; without the file of ratings it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

from common import interval, table
from regraft.completion.complete import BASELINES, OURS, CompletionReport, complete_ratings
from regraft.settings import CompletionSettings

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "movielens-small" / "ratings.csv"


def page(reports: list[CompletionReport]) -> str:
    """The Markdown page."""
    first = reports[0]
    lines = [
        "# Completing real ratings",
        "",
        f"Written by `python benchmarks/ratings.py`: {Path(first.ratings).name}, {first.known + first.held_out:,} ratings of {first.users:,} users "
        f"for {first.items:,} items, {len(reports)} random splits of 90/10, rank {first.rank}, depth {first.settings.depth}.",
        "",
    ]
    body: list[list[str]] = []
    ours = [report.errors[OURS].rmse for report in reports]
    for name in (OURS, *BASELINES):
        rmse = [report.errors[name].rmse for report in reports]
        mae = statistics.mean(report.errors[name].mae for report in reports)
        differences = [other - own for other, own in zip(rmse, ours, strict=True)]
        gap = "" if name == OURS else "{:+.4f} ± {:.4f}".format(*interval(differences))
        body.append([name, f"{statistics.mean(rmse):.4f}", f"{statistics.stdev(rmse):.4f}", f"{mae:.4f}", gap])
    lines += table(["method", "RMSE, mean", "SD over splits", "MAE, mean", "RMSE less ours (95 %, paired)"], body)
    seconds = statistics.median(report.seconds for report in reports)
    lines += [
        f"Seconds for one split, all methods, median: {seconds:.0f}. Machine: {os.cpu_count()} cores, {platform.machine()}; "
        + ", ".join(f"{name} {version(name)}" for name in ("regraft", "torch", "scikit-learn"))
        + f"; seeds 0 to {len(reports) - 1}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the splits and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, default=SHARED)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--rank", type=int, default=10)
    options = parser.parse_args()
    if not options.ratings.is_file():
        raise SystemExit(f"'{options.ratings}' is not there; give a MovieLens-style CSV with --ratings")
    reports: list[CompletionReport] = []
    for seed in range(options.splits):
        reports.append(complete_ratings(options.ratings, None, CompletionSettings(rank=options.rank, recommend=0), seed=seed))
        print(f"split {seed}: " + ", ".join(f"{name} {errors.rmse:.4f}" for name, errors in reports[-1].errors.items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "ratings.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["split", "method", "rmse", "mae", "rank", "threshold", "known", "held_out", "seconds"])
        for report in reports:
            for name, errors in report.errors.items():
                row = [report.seed, name, f"{errors.rmse:.6f}", f"{errors.mae:.6f}", report.rank, f"{report.threshold:.4g}"]
                writer.writerow([*row, report.known, report.held_out, f"{report.seconds:.1f}"])
    (RESULTS / "ratings.md").write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
