"""Draws ``results/pruning.md`` from the rows that ``pruning.py`` has measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import common

Rows = list[dict[str, str]]

OURS = "regraft, per-layer, surgeon"  # what quotients are of
OTHERS = {"torch-pruning": "Torch-Pruning", "optipfair": "optipfair", "Taylor, uniform": "uniform Taylor"}
TARGET, SPEED_TARGET = 0.6, 0.85
FAIR = 0.005
"""Share of the parameters by which a size may miss the ratio and still be compared."""


def write(model: str, held_out: str, ratios: Sequence[float]) -> None:
    """Writes the page.

    Args:
        model: Rows of other models are left out.
        held_out: What the losses were measured on.
        ratios: Columns of the tables of quality.
    """
    machine = f"Machine: {common.machine()}; " + common.versions("regraft", "torch", "transformers", "torch-pruning", "optipfair") + "."
    lines = [
        "# Pruning, measured",
        "",
        f"Written by `python benchmarks/pruning.py`. Model: {model}, float32. {machine}",
        "",
        f"Losses are nats per token over the dense model's on {held_out} which nothing was fitted to, in windows of 128 tokens. Every method",
        "calibrates on the same 128 windows of 128 tokens, drawn by the calibration seed from other documents. No method trains. Ratios are",
        "shares of all parameters, embeddings included. Seconds are those of the processor, one thread, on a machine that had other work to do.",
        "",
    ]
    for name, draw in SECTIONS.items():
        rows = [row for row in common.read_rows(_file(name)) if row.get("model", model) == model or name == "speed"]
        if rows:
            lines += draw(rows, ratios)
    (common.RESULTS / "pruning.md").write_text("\n".join(lines), encoding="utf-8")


def _file(name: str) -> Path:
    return common.RESULTS / f"pruning_{name}.csv"


def _nats(row: dict[str, str]) -> float:
    return float(row["nats_over_dense"])


def _fair(row: dict[str, str]) -> bool:
    return abs(float(row["removed"]) - float(row["ratio"])) <= FAIR


def _at(rows: Rows, ratio: float) -> Rows:
    return [row for row in rows if float(row["ratio"]) == ratio]


def _shares(ratios: Sequence[float]) -> list[str]:
    return [f"{ratio:.0%}" for ratio in ratios]


# ---- quality ----------------------------------------------------------------------------------------------------------------------


def paired(rows: Rows, ratios: Sequence[float]) -> list[str]:
    lines = [
        "## Ours beside Taylor and the other packages, over calibration seeds",
        "",
        "The same windows for every method of a seed: mean and, where there are several seeds, 95 % interval (Student's t). Of each other package "
        "the setting is shown that loses least on the held-out text at that ratio (table below), so the choice is in its favour; sizes are within "
        f"{FAIR:.1%} of the parameters. Quotients are paired: the loss of `regraft, per-layer, surgeon` over that of the row, of one seed. Target: at most {TARGET}. Scores and curves of a "
        "seed are kept between ratios, so that the ratio measured first pays for them.",
        "",
    ]
    body: list[list[str]] = []
    said: list[str] = []
    for ratio in ratios:
        quotients = _quotients(_at(rows, ratio))
        for name, found in _by_method(_at(rows, ratio)).items():
            body.append(
                [
                    f"{ratio:.0%}",
                    name,
                    f"{statistics.fmean(float(row['removed']) for row in found.values()):.2%}",
                    str(len(found)),
                    _with_interval([_nats(row) for row in found.values()]),
                    _with_interval(quotients[name]) if name in quotients else "",
                    f"{statistics.median(float(row['cpu_seconds']) for row in found.values()):.0f}",
                ]
            )
        if quotients:
            worst = {
                what: max((statistics.fmean(q) for name, q in quotients.items() if name.startswith(what)), default=None) for what in OTHERS
            }
            met = all(value is not None and value <= TARGET for value in worst.values())
            told = ", ".join(f"{value:.2f} of {OTHERS[what]}" for what, value in worst.items() if value is not None)
            said.append(f"{ratio:.0%}: {told} ({'met' if met else 'not met'})")
    lines += common.table(("ratio", "method", "removed", "seeds", "nats over dense", "ours : this", "seconds"), body)
    return [*lines, f"{OURS} against the target: " + "; ".join(said) + ".", ""] if said else lines


def _by_method(rows: Rows) -> dict[str, dict[str, dict[str, str]]]:
    """By method and seed."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        name = f"{row['method']}: {row['setting']}" if row["setting"] else row["method"]
        found.setdefault(name, {})[row["seed"]] = row
    return found


def _quotients(rows: Rows) -> dict[str, list[float]]:
    """Our loss by that of each other method, seed by seed."""
    methods = _by_method(rows)
    ours = methods.pop(OURS, {})
    found = {name: [_nats(ours[seed]) / _nats(row) for seed, row in other.items() if seed in ours] for name, other in methods.items()}
    return {name: values for name, values in found.items() if values}


def _with_interval(values: Sequence[float]) -> str:
    mean, half = common.interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {half:.3f}"


def rivals(rows: Rows, ratios: Sequence[float]) -> list[str]:
    lines = [
        "## Every setting of the other packages that was tried",
        "",
        "Calibration seed 0. What was done for them is told in `benchmarks/rivals.py`. In brackets: a size that misses the ratio by more than "
        f"{FAIR:.1%}, which is not compared. Empty: no such model, or not measured.",
        "",
    ]
    body: list[list[str]] = []
    for package, setting in dict.fromkeys((row["package"], row["setting"]) for row in rows):
        own = [row for row in rows if (row["package"], row["setting"]) == (package, setting)]
        body.append([package, setting, *(_cell(_at(own, ratio), best=_best(_at(rows, ratio), package)) for ratio in ratios)])
    return lines + common.table(("package", "setting", *_shares(ratios)), body)


def _best(rows: Rows, package: str) -> float | None:
    return min((_nats(row) for row in rows if row["package"] == package and _fair(row)), default=None)


def _cell(rows: Rows, best: float | None = None) -> str:
    if not rows:
        return ""
    text = f"{_nats(rows[0]):.3f}"
    if not _fair(rows[0]):
        return f"({text} at {float(rows[0]['removed']):.1%})"
    return f"**{text}**" if _nats(rows[0]) == best else text


def wide(rows: Rows, ratios: Sequence[float]) -> list[str]:
    lines = [
        "## Criterion, selection, re-fit",
        "",
        "Calibration seed 0; heads and FFN channels; least loss of a column in bold. An empty cell was not measured: most is at 20 %, and what is "
        "dear (the knapsack, the re-fit to the dense model's predictions) for the strong criteria first. `regraft, per-layer, surgeon` of the first table "
        "is surgeon, knapsack, divergence. The re-fit `mean` needs biases, which this format has not got.",
        "",
    ]
    keys = sorted({(row["refit"], row["selection"], row["criterion"]) for row in rows}, key=_wide_order(rows))
    least = {ratio: min((_nats(row) for row in _at(rows, ratio)), default=None) for ratio in ratios}
    body: list[list[str]] = []
    for refit, selection, criterion in keys:
        own = [row for row in rows if (row["refit"], row["selection"], row["criterion"]) == (refit, selection, criterion)]
        body.append([criterion, selection, refit, *(_cell(_at(own, ratio), least[ratio]) for ratio in ratios)])
    return lines + common.table(("criterion", "selection", "re-fit", *_shares(ratios)), body)


def _wide_order(rows: Rows) -> Callable[[tuple[str, str, str]], tuple[int, int, int]]:
    refits = ("none", "least_squares", "divergence")
    selections = ("uniform", "global", "knapsack")
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    return lambda key: (refits.index(key[0]), selections.index(key[1]), criteria.index(key[2]))


def modes(rows: Rows, _ratios: Sequence[float]) -> list[str]:
    lines = [
        "## What is cut",
        "",
        "At 20 %, calibration seed 0, everything else by default, but re-fitted by least squares only.",
        "",
    ]
    body = [[row["mode"], f"{float(row['removed']):.2%}", f"{_nats(row):.3f}", f"{float(row['cpu_seconds']):.0f}"] for row in rows]
    return lines + common.table(("targets", "removed", "nats over dense", "seconds"), body)


# ---- cost -------------------------------------------------------------------------------------------------------------------------


def speed(rows: Rows, _ratios: Sequence[float]) -> list[str]:
    lines = [
        "## Speed kept",
        "",
        "Prefill of 128 tokens and decoding of 12 after them, batch 1, one thread, processor time, medians of repeats in turns. Widths are "
        "multiples of 16 (110 M: 64), the same in every layer. *Operations* is the quotient of multiply-accumulates, dense by pruned. "
        "*Overhead* is the share of the dense model's time that does not shrink with its widths, estimated from a model with one head and one "
        f"FFN channel in every layer; *possible* is the speed-up that it leaves. Target: *kept* at least {SPEED_TARGET}.",
        "",
    ]
    body = [
        [
            row["model"],
            f"{float(row['removed']):.1%}",
            row["phase"],
            row["dense_ms"],
            row["pruned_ms"],
            *(common.rounded(row[name], 2) for name in ("speedup", "operations", "kept")),
            f"{float(row['overhead_share']):.0%}",
            common.rounded(row["possible"], 2),
        ]
        for row in rows
    ]
    head = ("model", "removed", "phase", "dense, ms", "pruned, ms", "speed-up", "operations", "kept", "overhead", "possible")
    missed = [row for row in rows if float(row["kept"]) < SPEED_TARGET]
    return lines + common.table(head, body) + ([_why(missed), ""] if missed else ["The target is met everywhere.", ""])


def _why(missed: Rows) -> str:
    said = [
        f"{row['model']} at {float(row['removed']):.0%}, {row['phase']}: kept {float(row['kept']):.2f}, while {float(row['overhead_share']):.0%} "
        f"of the dense model's time is overhead and a speed-up of {float(row['possible']):.2f} possible"
        for row in missed
    ]
    return "Below the target, and why: " + "; ".join(said) + "."


def growth(rows: Rows, _ratios: Sequence[float]) -> list[str]:
    lines = [
        "## Growth of the cost",
        "",
        "Llamas of random weights; processor seconds of one thread, medians of up to 5. Against layers (4 to 32) the width is 128; against "
        "width (64 to 512) there are 4 layers, and the FFN grows with it; scoring reads 256 tokens. The exponent is the slope of log seconds against log size: 1 is linear in "
        "layers; the parameters of a layer grow with the square of the width. At these sizes fixed costs hold the slopes down; the last "
        "step shows more of what follows.",
        "",
    ]
    body: list[list[str]] = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        for against in dict.fromkeys(row["against"] for row in rows):
            own = {row["factor"]: float(row["cpu_seconds"]) for row in rows if (row["stage"], row["against"]) == (stage, against)}
            factors, seconds = [float(factor) for factor in own], list(own.values())
            slopes = [common.exponent(factors[first:], seconds[first:]) for first in (0, -2)] if len(own) > 1 else []
            cells = [common.rounded(own[factor]) if factor in own else "" for factor in ("1", "2", "4", "8")]
            body.append([stage, against, *cells, *([common.rounded(slope, 2) for slope in slopes] or ["", ""])])
    return lines + common.table(("stage", "against", "1x", "2x", "4x", "8x", "exponent", "last step"), body)


def discovery(rows: Rows, _ratios: Sequence[float]) -> list[str]:
    row = rows[0]
    return [
        f"Discovery of the 7B shape (32 layers, width 4096; {int(row['parameters']):,} parameters) by following its computation found "
        f"{row['groups']} groups in {row['seconds']} s ({row['cpu_seconds']} s of the processor); peak resident memory of the process "
        f"{row['peak_mebibytes']} MiB, of which {row['imports_mebibytes']} MiB are imports. Targets: 10 s, 1 GB.",
        "",
    ]


SECTIONS: dict[str, Callable[[Rows, Sequence[float]], list[str]]] = {
    "paired": paired,
    "rivals": rivals,
    "wide": wide,
    "modes": modes,
    "speed": speed,
    "growth": growth,
    "discovery": discovery,
}
