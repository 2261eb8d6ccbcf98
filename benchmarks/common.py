"""What the benchmarks share: a line about the machine, tables that are drawn from CSV files, statistics of paired runs."""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.stats import t

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and system, without a host name."""
    model = platform.machine()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names and names[0] not in ("", "unknown") else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def versions(*packages: str) -> str:
    return ", ".join(f"{package} {version(package)}" for package in packages)


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a row; the file is whole after every one, so that an interrupted run goes on where it stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, row.keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""]


def rounded(value: str | float, places: int = 3) -> str:
    return f"{float(value):.{places}f}"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds against log size, by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in seconds]).slope


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, by Student's t."""
    if len(values) < 2:
        return values[0], math.nan
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half
