"""Draws the tables of the adapters from what ``adapters.py`` and ``adapters_few_shot.py`` wrote: ``results/adapters.md``.

python benchmarks/adapters_tables.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from adapters import BATCH, COST, RATIO, RECOVERY, STEPS, TARGETS, TOKENS, TUNING_SEED
from adapters_few_shot import ROWS, TUNING_SEEDS, WAYS
from common import RESULTS, interval, machine, read_rows, rounded, table, versions

LIMITS = {
    "basis_wall_seconds": ("basis of a 4096 x 4096 layer, rank 8, on two threads, shortest of three (s)", "1.5"),
    "basis_processor_seconds": ("the same, processor time over both threads, median (s)", ""),
    "deep_lora_step_over_lora": ("processor time of a Deep LoRA step over LoRA's, rank 8 everywhere, median of paired turns", "1.10"),
    "nola_bytes_above_lora": ("memory of a NOLA step above LoRA's, 4096 x 4096, rank 16, 512 bases (MB)", "64"),
}


def recovery() -> Iterator[str]:
    """Every adapter: what it costs and what it reaches."""
    rows, costs = read_rows(RECOVERY), {row["adapter"]: row for row in read_rows(COST)}
    if not rows:
        return
    chosen: dict[str, dict[str, str]] = {}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        name = row["adapter"]
        if int(row["seed"]) == TUNING_SEED:
            best = chosen.get(name)
            chosen[name] = row if best is None or float(row["choice_nats"]) < float(best["choice_nats"]) else best
        elif row["factor"] != "0.0":
            found.setdefault(name, {})[int(row["seed"])] = float(row["test_nats"])
    before = {row["adapter"]: row for row in rows if row["factor"] == "0.0"}
    yield "## Recovery at one budget"
    yield ""
    yield (
        f"stories3M without {RATIO:.0%} of its parameters, {STEPS} steps of {BATCH} x {TOKENS} tokens. Before: "
        + ", ".join(f"{name} {float(row['choice_nats']):.3f} and {float(row['test_nats']):.3f}" for name, row in before.items())
        + " nats a token on the two held-out texts. Rate: so many times the adapter's own, the best of those tried. Loss: at that rate, on the "
        "text that chose it, of the one seed that chose it. Where the paired seeds have run, their mean on the other text and the difference to "
        "LoRA with the same seeds follow, with its 95 % interval from two seeds on."
    )
    yield ""
    lora = found.get("lora", {})
    lines: list[list[str]] = []
    for name, row in sorted(chosen.items(), key=lambda item: float(item[1]["choice_nats"])):
        cost, values = costs[name], found.get(name, {})
        shared = [seed for seed in values if seed in lora and name != "lora"]
        mean, half = interval([values[seed] - lora[seed] for seed in shared]) if shared else (math.nan, math.nan)
        lines.append(
            [
                name,
                f"{int(row['trained']):,}",
                f"{int(cost['file_bytes']) / 1000:,.0f}",
                rounded(1000 * float(cost["step_seconds"]), 0),
                rounded(int(cost["peak_bytes"]) / 1e6, 0),
                f"{float(row['factor']):g}",
                rounded(row["choice_nats"]),
                f"{rounded(statistics.fmean(values.values()))} ({len(values)})" if values else "",
                "" if math.isnan(mean) else f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}"),
            ]
        )
    head = ("adapter", "trained", "file (kB)", "step (ms)", "peak (MB)", "rate", "loss", "other text (seeds)", "to LoRA")
    yield from table(head, lines)


def goals() -> Iterator[str]:
    """What was aimed at."""
    rows = read_rows(TARGETS)
    if rows:
        yield "## What they were built to"
        yield ""
        yield from table(("what", "measured", "at most"), [_goal(row["what"], float(row["value"])) for row in rows])


def _goal(what: str, value: float) -> Sequence[str]:
    words, limit = LIMITS[what]
    return words, rounded(value / 1e6, 1) if what.endswith("lora") and value > 1e3 else rounded(value, 2), limit


def few_shot() -> Iterator[str]:
    """Deep LoRA beside both LoRAs."""
    rows = [row for row in read_rows(ROWS) if int(row["seed"]) not in TUNING_SEEDS]
    untouched = next((float(row["pearson"]) for row in rows if row["way"] == "untouched"), None)
    rows = [row for row in rows if row["way"] != "untouched"]
    if not rows:
        return
    yield "## A few pairs of sentences"
    yield ""
    yield (
        "STS-B, all-MiniLM-L6-v2, Pearson's correlation on 300 held-out pairs"
        + (f" (the encoder as it is: {untouched:.4f})" if untouched is not None else "")
        + ". Mean (standard deviation) over the seeds; the difference of Deep LoRA to each LoRA is paired by seed, with its 95 % interval."
    )
    yield ""
    settings = sorted({(int(row["pairs"]), int(row["rank"])) for row in rows})
    lines: list[list[str]] = []
    for pairs, rank in settings:
        here = {
            way: {
                int(row["seed"]): float(row["pearson"])
                for row in rows
                if (row["way"], int(row["pairs"]), int(row["rank"])) == (way, pairs, rank)
            }
            for way in WAYS
        }
        seeds = sorted(set.intersection(*(set(values) for values in here.values())))
        if len(seeds) < 2:
            continue
        line = [str(pairs), str(rank), str(len(seeds))]
        for way in WAYS:
            values = [here[way][seed] for seed in seeds]
            line.append(f"{statistics.fmean(values):.4f} ({statistics.stdev(values):.4f})")
        for way in ("lora", "lora, plain"):
            mean, half = interval([here["deep_lora"][seed] - here[way][seed] for seed in seeds])
            line.append(f"{mean:+.4f} ± {half:.4f}")
        lines.append(line)
    yield from table(("pairs", "rank", "seeds", "Deep LoRA", "LoRA, 16/r", "LoRA, plain", "Deep - LoRA", "Deep - plain"), lines)


def main() -> None:
    where = f"{machine()}, one thread unless said; {versions('torch', 'transformers', 'peft')}."
    lines = ["# Adapters", "", where, "", *recovery(), *goals(), *few_shot()]
    path = RESULTS / "adapters.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
