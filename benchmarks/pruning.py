"""Pruning measured: quality without training, the speed that is kept, and how the cost grows.

    python benchmarks/pruning.py [--only rivals|paired|wide|modes|speed|growth|tables] [--minutes N] [--threads N] [--work DIR]

* ``rivals``: every setting of Torch-Pruning and optipfair (``rivals.py``) at 10, 20, 30 and 50 % of all parameters, on one calibration seed.
* ``paired``: our default and its variants, plain Taylor and the best settings of each rival over calibration seeds, seed by seed on the same windows.
* ``wide``: held-out loss of the criteria x selections x re-fits, one calibration seed.
* ``modes``: what can be cut, by itself and together, at 20 %.
* ``speed`` and ``growth``: see ``pruning_cost.py``.

The model is stories3M with TinyStories where the folder ``shared`` lies beside the checkout, else the built-in seedling with its own text.
Calibration text and held-out text are different documents; nothing is searched on the held-out ones, except the rivals' best settings,
which are chosen by them, in their favour. Rows go to ``benchmarks/results/pruning_*.csv`` as they are measured, and a run goes on where the
last one stopped; with ``--minutes`` it stops by itself. Delete a file to measure it anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import common
import pruning_cost
import pruning_tables
import rivals
from regraft.data.text import Corpus, read_corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.groups.discover import discover
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.view import ModelView, parameter_count
from regraft.pipelines.prune.planning import draw_windows
from regraft.pipelines.prune.prune import cut_to_plan, plan_pruning
from regraft.pipelines.prune.resolved import ResolvedPrune, resolve
from regraft.plans import Groups
from regraft.settings import EvaluateSettings, LoadSettings, PruneSettings

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models" / "stories3M"
RATIOS = (0.1, 0.2, 0.3, 0.5)
SCREENED = (0.1, 0.3)
"""Ratios at which only those settings of other packages are measured that do well at the others."""
SEEDS = (0, 1, 2, 3, 4)
HELD_OUT_DOCUMENTS, CALIBRATION_DOCUMENTS = 32, 1600
WINDOW = 128
CRITERIA: dict[str, dict[str, Any]] = {
    "surgeon": {"criterion": "surgeon"},
    "taylor, first": {"criterion": "taylor"},
    "wanda": {"criterion": "wanda"},
    "flap": {"criterion": "flap"},
    "energy": {"criterion": "energy"},
    "l2": {"criterion": "l2"},
    "l1": {"criterion": "l1"},
    "random": {"criterion": "random"},
    "taylor, second": {"criterion": "taylor", "order": "second"},
    "taylor, mixed": {"criterion": "taylor", "order": "mixed"},
    "taylor, first, vector": {"criterion": "taylor", "granularity": "vector"},
}
STRONG = ("surgeon", "taylor, first", "wanda", "flap", "energy")
REDUCTIONS = ("mean", "max", "product", "last")
MODES: dict[str, dict[str, Any]] = {
    "heads and ffn (default)": {},
    "ffn": {"targets": ("ffn",)},
    "query_heads and ffn": {"targets": ("query_heads", "ffn")},
    "residual": {"targets": ("residual",)},
    "residual, heads and ffn": {"targets": ("residual", "heads", "ffn")},
    "layers, by removal": {"targets": ("layers",)},
    "layers, by block_influence": {"targets": ("layers",), "depth": "block_influence"},
    "layers, by angular": {"targets": ("layers",), "depth": "angular"},
    "attention and mlp": {"targets": ("attention", "mlp")},
    "layers, heads and ffn": {"targets": ("layers", "heads", "ffn")},
    "attention, mlp, heads and ffn": {"targets": ("attention", "mlp", "heads", "ffn")},
    "heads and ffn, the same in every layer": {"shape": "uniform"},
    "heads and ffn, in 3 rounds": {"rounds": 3},
}
OURS: dict[str, dict[str, Any]] = {
    "regraft, default: equal layers": {"shape": "uniform"},
    "regraft, per-layer": {},
    "regraft, per-layer, surgeon": {"criterion": "surgeon", "effort": "thorough"},
    "Taylor, uniform, heads and ffn": {"criterion": "taylor", "select": "uniform", "reconstruct": "none"},
    "Taylor, uniform, ffn": {"criterion": "taylor", "select": "uniform", "reconstruct": "none", "targets": ("ffn",)},
}


class Clock:
    """Says when to stop: a row is begun only while there is time."""

    def __init__(self, minutes: float | None) -> None:
        self._end = time.monotonic() + 60.0 * minutes if minutes else float("inf")

    def out(self) -> bool:
        return time.monotonic() > self._end


@dataclass
class Bench:
    """A model with its text, loaded once for all sections."""

    work: Path
    clock: Clock

    @property
    def name(self) -> str:
        return STORIES.name if STORIES.is_dir() else "seedling"

    @cached_property
    def loaded(self) -> Loaded:
        return load(STORIES if STORIES.is_dir() else "seedling", LoadSettings(dtype="float32"))

    @cached_property
    def text(self) -> tuple[Path, Corpus]:
        """A file of calibration text, and held-out documents that are not in it."""
        path = SHARED / "data" / "tinystories" / "train.txt"
        if path.is_file():
            documents = read_corpus(path, "train").documents
            held, used = documents[-HELD_OUT_DOCUMENTS - 1 : -1], documents[:CALIBRATION_DOCUMENTS]  # the last one is cut off
            name = "TinyStories"
        else:
            held, used = read_corpus(None, "test").documents[:HELD_OUT_DOCUMENTS], read_corpus(None, "validation").documents
            name = "seedling's text"
        self.work.mkdir(parents=True, exist_ok=True)
        calibration_file = self.work / "calibration.txt"
        if not calibration_file.is_file():
            calibration_file.write_text("\n<|endoftext|>\n".join(used), encoding="utf-8")
        return calibration_file, Corpus(name, "held-out", documents=tuple(held))

    @cached_property
    def groups(self) -> Groups:
        return discover(self.loaded.model)

    @cached_property
    def dense_nats(self) -> float:
        return self.loss(self.loaded.model)

    def settings(self, ratio: float, asked: dict[str, Any]) -> PruneSettings:
        given: dict[str, Any] = {"shape": "per-layer"} | asked
        return PruneSettings(ratio=ratio, calibration=self.text[0], cache=self.work / "scores", **given)

    def loss(self, model: PreTrainedModel) -> float:
        settings = EvaluateSettings(window=WINDOW, stride=WINDOW)
        return evaluate_loss(model, require_tokenizer(self.loaded), self.text[1], settings).loss_nats

    def ours(self, ratio: float, asked: dict[str, Any], seed: int) -> PreTrainedModel:
        model = self.loaded.model
        resolved = resolve(self.settings(ratio, asked), ModelView(model), seed)
        groups = discover(model, resolved.kinds) if "targets" in asked else self.groups
        windows = self.windows(resolved) if resolved.needs_text else None
        plan = plan_pruning(model, groups, resolved, windows)
        return cut_to_plan(model, groups, plan, resolved, windows)

    def windows(self, resolved: ResolvedPrune) -> Tensor:
        return draw_windows(self.loaded, read_corpus(self.text[0], "validation"), resolved)

    def evidence(self, seed: int) -> rivals.Evidence:
        """What the other packages calibrate on; the gradients of a seed are kept."""
        found = rivals.Evidence(self.windows(resolve(self.settings(0.1, {}), seed=seed)))
        path = self.work / f"gradients-{self.name}-{seed}.safetensors"
        if path.is_file():
            kept = load_file(path)
            found.first, found.second = ({name[2:]: kept[name] for name in kept if name[0] == order} for order in "12")
        else:
            first, second = found.gradients(self.loaded.model)
            save_file({f"1 {name}": value for name, value in first.items()} | {f"2 {name}": value for name, value in second.items()}, path)
        return found


def measured(bench: Bench, section: str, key: dict[str, Any], make: Callable[[], PreTrainedModel | None]) -> None:
    """Makes a model and adds its row, unless it is there already, or the time is over, or there is no such model."""
    path = common.RESULTS / f"pruning_{section}.csv"
    key = {"model": bench.name} | key

    def is_there() -> bool:
        return any(all(row[name] == str(value) for name, value in key.items()) for row in common.read_rows(path))

    if is_there() or bench.clock.out():
        return
    started = time.process_time()
    model = make()
    if model is None:
        return
    seconds = time.process_time() - started
    row = key | {
        "removed": round(1.0 - parameter_count(model) / bench.groups.parameters, 5),
        "dense_nats": round(bench.dense_nats, 5),
        "nats_over_dense": round(bench.loss(model) - bench.dense_nats, 5),
        "cpu_seconds": round(seconds, 1),
    }
    if not is_there():  # another process may have been faster
        common.add_row(path, row)
    print(section, *row.values(), flush=True)


def section_rivals(bench: Bench) -> None:
    evidence = bench.evidence(0)
    for ratio, ((package, setting), prune) in product((0.2, 0.5, 0.1, 0.3), rivals.RIVALS.items()):
        if ratio in SCREENED and not promising(bench.name, package, setting):
            continue
        key = {"package": package, "setting": setting, "ratio": ratio, "seed": 0}
        measured(bench, "rivals", key, partial(prune, bench.loaded.model, evidence, ratio))


def promising(model: str, package: str, setting: str) -> bool:
    """Whether a setting is among the better half of its package's at a ratio where all were measured, or could not be compared there."""
    rows = [row for row in common.read_rows(common.RESULTS / "pruning_rivals.csv") if (row["model"], row["package"]) == (model, package)]
    for ratio in (ratio for ratio in RATIOS if ratio not in SCREENED):
        losses = {row["setting"]: float(row["nats_over_dense"]) for row in rows if float(row["ratio"]) == ratio}
        if losses and losses.get(setting, 0.0) <= statistics.median(losses.values()):
            return True
    return False


def best_rivals(model: str, ratio: float) -> dict[str, str]:
    """The setting of each rival that loses least at a ratio, among those within half a per cent of the size."""
    rows = [row for row in common.read_rows(common.RESULTS / "pruning_rivals.csv") if row["model"] == model]
    fair = [row for row in rows if float(row["ratio"]) == ratio and abs(float(row["removed"]) - ratio) <= pruning_tables.FAIR]
    return {
        package: min((row for row in fair if row["package"] == package), key=lambda row: float(row["nats_over_dense"]))["setting"]
        for package in dict.fromkeys(row["package"] for row in fair)
    }


def section_paired(bench: Bench) -> None:
    for seed in SEEDS:
        for ratio, (name, asked) in product(RATIOS, OURS.items()):
            key = {"method": name, "setting": "", "ratio": ratio, "seed": seed}
            measured(bench, "paired", key, partial(bench.ours, ratio, asked, seed))
        evidence = bench.evidence(seed)
        for ratio in RATIOS:
            for package, setting in best_rivals(bench.name, ratio).items():
                key = {"method": package, "setting": setting, "ratio": ratio, "seed": seed}
                measured(bench, "paired", key, partial(rivals.RIVALS[package, setting], bench.loaded.model, evidence, ratio))


def wide_rows(ratio: float) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Criterion, selection, re-fit and the settings they are, of what is worth its time at a ratio; the most telling ones first."""
    plain = [("uniform", "none"), ("uniform", "least_squares"), ("global", "none")]
    choices = [(name, *how) for name in CRITERIA for how in plain]
    choices += [(name, "knapsack", "least_squares") for name in STRONG]
    if ratio == 0.2:
        choices += [(name, "knapsack", "none") for name in STRONG]
        choices += [(name, "global", "least_squares") for name in STRONG]
        choices += [(name, selection, "divergence") for name in STRONG[:3] for selection in ("uniform", "knapsack")]
        choices += [(name, "knapsack", "least_squares") for name in CRITERIA if name not in STRONG]
    for name, selection, refit in choices:
        yield name, selection, refit, CRITERIA[name] | {"select": selection, "reconstruct": refit}
    if ratio == 0.2:
        for reduction in REDUCTIONS:
            asked = {"criterion": "taylor", "reduce": reduction, "select": "uniform", "reconstruct": "none"}
            yield f"taylor, first, {reduction}", "uniform", "none", asked


def section_wide(bench: Bench) -> None:
    for ratio in (0.2, 0.5, 0.1, 0.3):
        for criterion, selection, refit, asked in wide_rows(ratio):
            key = {"criterion": criterion, "selection": selection, "refit": refit, "ratio": ratio, "seed": 0}
            measured(bench, "wide", key, partial(bench.ours, ratio, asked, 0))


def section_modes(bench: Bench) -> None:
    for name, asked in MODES.items():
        key = {"mode": name, "ratio": 0.2, "seed": 0}
        measured(bench, "modes", key, partial(bench.ours, 0.2, asked | {"reconstruct": "least_squares"}, 0))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "rivals": section_rivals,
    "paired": section_paired,
    "wide": section_wide,
    "modes": section_modes,
    "speed": lambda bench: pruning_cost.section_speed(bench.loaded.model),
    "growth": lambda _bench: pruning_cost.section_growth(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=(*SECTIONS, "tables"), help="this section; repeatable")
    parser.add_argument("--minutes", type=float, help="stop after so long; the next run goes on from there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"), help="scores and calibration text are kept here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.work, Clock(options.minutes))
    for name in options.only or SECTIONS:
        if name in SECTIONS:
            SECTIONS[name](bench)
    pruning_tables.write(bench.name, f"{bench.text[1].name}, {HELD_OUT_DOCUMENTS} documents", RATIOS)


if __name__ == "__main__":
    main()
