"""Rank allocation on planted objectives: known concave gains plus noise of known size, from 6 to 80 layers.

    python benchmarks/rank_allocation_planted.py [--section NAME ...] [--work runs/rank_allocation_planted] [--seeds 8]

Nothing is trained here: the planted objective answers what the search asks for. What is measured is the share of the attainable gain
over uniform that the ranks have which are kept, without noise, and what search and confirmation cost in units of one full recovery. The
search starts from the shipped prior, as it does by default. Every search leaves one line in the work folder's CSV and is not repeated;
tables are written into ``benchmarks/results``.

The planted objective. Slot l gains A_l g_l(r), g_l one of four concave shapes (logarithm, root, exponential, r / (r + c)) with a stretch
from 0.6 to 1.6 around rank 8. log A_l has standard deviation 1, half of its variance told by the features (gradient energy and share
pruned, each with noise of its own; importance removed tells nothing). Slots cost 1 to 2 times the same. Ranks 2 to 12, budget r=8.

- A recovery of fidelity phi shows phi^0.35 of a gain, sees each slot's amplitude with a relative error of 0.3 (1 - phi), and has noise
  of known standard deviation, the same at every fidelity, as a share of the attainable gain. A survivor pays for further steps alone.
- An elastic adapter costs what it costs by default; it shows 0.7 of a gain, sees each slot's amplitude with a
  relative error of 0.25, and a score's noise is a quarter of a recovery's (it is a forward pass on fixed tokens).
- Confirmation is the default one: recoveries of an eighth on five fresh seeds (seven with one finalist), each with noise of its own, of
  uniform, what was found and the best closed form. It decides what is kept, and its cost is counted.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common import table
from regraft.allocation import (
    ALLOCATORS,
    MOST_FINALISTS,
    ClosedForm,
    Learner,
    Proposal,
    RankAdaptor,
    Ranks,
    Request,
    Rung,
    Schedule,
    confirm,
    finalists,
    next_request,
    rank_space,
    winner,
)
from regraft.allocation.fill import fill, moved, moves, random_vectors
from regraft.allocation.meta import train
from regraft.allocation.prior import default_prior
from regraft.allocation.rankadaptor import first_vectors
from regraft.pipelines.ranks.cost import schedule_of
from regraft.pipelines.ranks.measuring import elastic_cost
from regraft.plans import RANK_CHOICES, PastSearch, RankSlot, RankSpace, RankTrial
from regraft.settings import AllocateSettings, RecoverSettings

RESULTS = Path(__file__).parent / "results"
SHAPES: tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], ...] = (
    np.log1p,
    np.sqrt,
    lambda x: 1 - np.exp(-x),
    lambda x: x / (1 + x),
)
TOTAL_NATS = 0.1
"""Gain of the largest ranks everywhere over the smallest."""

DEFAULT = schedule_of(AllocateSettings(), RecoverSettings())
SCORE = elastic_cost(RecoverSettings(), 2) - elastic_cost(RecoverSettings(), 1)
TRAINED = elastic_cost(RecoverSettings(), 1) - SCORE
RECOVERIES = schedule_of(AllocateSettings(trials=12, elastic=0), RecoverSettings())
STARTS = {
    1.0: (Rung(0.125, 6), Rung(0.25, 3)),
    2.0: (Rung(0.125, 8), Rung(0.25, 5), Rung(0.5, 2)),
    4.0: (Rung(0.125, 12), Rung(0.25, 6), Rung(0.5, 3), Rung(1.0, 2)),
}
"""What a start from a prior is measured with, by the limit of the cost."""
FIELDS: tuple[str, ...] = ("section", "layers", "method", "noise", "world", "seed", "share", "cost", "seconds", "kept")


@dataclass(frozen=True)
class World:
    """What is planted; the defaults are those of the page's head."""

    layers: int
    noise: float = 0.1
    told: float = 0.5
    interaction: float = 0.0
    elastic_error: float = 0.25
    flat: bool = False
    name: str = "concave"


class Planted:
    """One objective of a world, and its answers to a search."""

    def __init__(self, world: World, seed: int) -> None:
        draw = np.random.default_rng((seed, 1))
        self.world, self.draw, self.seed = world, np.random.default_rng((seed, 2)), seed
        count, ranks = world.layers, np.array(RANK_CHOICES, dtype=np.float64)
        told, own = draw.standard_normal((2, count))
        amplitude = np.exp(np.sqrt(world.told) * told + np.sqrt(1 - world.told) * own)
        self.space = self._space(draw, told)
        shapes = [_normalised(SHAPES[int(draw.integers(len(SHAPES)))](ranks / (8 * draw.uniform(0.6, 1.6)))) for _ in range(count)]
        self.table = amplitude[:, None] * np.stack(shapes)
        self.table *= (0.0 if world.flat else TOTAL_NATS) / self.table[:, -1].sum()
        self.errors = {"elastic": draw.standard_normal(count), "short": draw.standard_normal(count)}
        self.uniform: Ranks = (self.space.uniform,) * count
        self.places = np.linspace(-1, 1, len(ranks))
        self.pairs = self._pairs(draw)
        self.best = self._best()
        self.attainable = self.gain(self.best)
        self.noise_nats = world.noise * (0.2 * TOTAL_NATS if world.flat else self.attainable)

    def _space(self, draw: np.random.Generator, told: NDArray[np.float64]) -> RankSpace:
        slots: list[RankSlot] = []
        for layer, known in enumerate(told):
            energy = np.exp(known + 0.5 * draw.standard_normal())
            features = {f"gradient_energy@{rank}": float(energy * (1 - 0.8**rank)) for rank in RANK_CHOICES}
            features |= {"share_pruned": float(1 / (1 + np.exp(-0.5 * known - 0.3 * draw.standard_normal())))}
            features |= {"importance_removed": float(np.exp(draw.standard_normal()))}
            slots.append(RankSlot(f"layers.{layer}", (f"layers.{layer}.up",), layer, int(draw.integers(8000, 16001)), 64, features))
        return rank_space("planted", "layer", slots, RANK_CHOICES, "r=8")

    def _pairs(self, draw: np.random.Generator) -> NDArray[np.float64]:
        """What neighbours gain or lose when their ranks are large together, as a share of the spread of the sum at random vectors."""
        pairs = draw.standard_normal(self.world.layers - 1)
        sample = draw.integers(0, len(RANK_CHOICES), (400, self.world.layers))
        spread = self.table[np.arange(self.world.layers), sample].sum(1).std()
        coupled = (pairs * self.places[sample[:, :-1]] * self.places[sample[:, 1:]]).sum(1).std()
        return pairs * self.world.interaction * spread / coupled

    def gain(self, ranks: Ranks, error: NDArray[np.float64] | float = 0.0) -> float:
        """What a vector gains over uniform, in nats, the slots' amplitudes off by a factor exp(error)."""
        return self._value(ranks, error) - self._value(self.uniform, error)

    def _value(self, ranks: Ranks, error: NDArray[np.float64] | float) -> float:
        index = np.searchsorted(RANK_CHOICES, ranks)
        places = self.places[index]
        gains = self.table[np.arange(len(index)), index] * np.exp(error)
        return float(gains.sum() + (self.pairs * places[:-1] * places[1:]).sum())

    def _best(self) -> Ranks:
        """The exact best where gains add up; with interactions, the best that moves of one and two slots reach from there."""
        ranks = fill(self.space, self.table) if not self.world.flat else self.uniform
        while self.world.interaction:
            around = [moved(self.space, ranks, int(up), int(down)) for up, down in zip(*moves(self.space, ranks), strict=True)]
            better = max(around, key=self.gain)
            if self.gain(better) <= self.gain(ranks) + 1e-12:
                break
            ranks = better
        return ranks

    def measure(self, request: Request, history: Sequence[RankTrial]) -> list[RankTrial]:
        """Answers a request of a search."""
        trials: list[RankTrial] = []
        for proposal in request.proposals:
            if request.kind == "elastic":
                seen = 0.7 * self.gain(proposal.ranks, self.world.elastic_error * self.errors["elastic"])
                loss = 5.0 - seen + 0.25 * self.noise_nats * float(self.draw.standard_normal())
                trials.append(RankTrial(proposal.ranks, loss, 1.0, SCORE + (0.0 if history or trials else TRAINED), "elastic"))
                continue
            before = [trial.fidelity for trial in history if trial.kind == "recovery" and trial.ranks == proposal.ranks]
            trials.append(self._recovered(proposal.ranks, request.fidelity, request.fidelity - max(before, default=0.0)))
        return trials

    def _recovered(self, ranks: Ranks, fidelity: float, cost: float, seed: int = 0) -> RankTrial:
        off = 0.3 * (1 - fidelity) * self.errors["short"]
        noise = self.noise_nats * float(self.draw.standard_normal())
        return RankTrial(ranks, 5.0 - fidelity**0.35 * self.gain(ranks, off) + noise, fidelity, cost, seed=seed)

    def search(self, learner: Learner, schedule: Schedule) -> tuple[Ranks, list[RankTrial]]:
        """Runs a whole search."""
        history: list[RankTrial] = []
        while (request := next_request(self.space, history, learner, schedule, self.seed)) is not None:
            history += self.measure(request, history)
        return winner(self.space, history, learner), history

    def confirmed(self, compared: Sequence[Ranks]) -> tuple[Ranks, float]:
        """What confirmation keeps, and what it costs."""
        settings = AllocateSettings()
        trials = [
            self._recovered(ranks, settings.confirm_share, settings.confirm_share, seed)
            for seed in range(1, settings.confirm_seeds * (1 + MOST_FINALISTS) // (1 + len(compared)) + 1)
            for ranks in ((self.uniform, *compared) if compared else ())
        ]
        return confirm(self.space, compared, trials).kept, sum(trial.cost for trial in trials)


def _normalised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values[0]) / (values[-1] - values[0])


def methods() -> dict[str, tuple[Learner | ClosedForm, Schedule]]:
    """What is compared, each with its schedule; all at most four full recoveries, confirmation included."""
    return {
        "rankadaptor": (RankAdaptor(), DEFAULT),
        "rankadaptor, recoveries only": (RankAdaptor(), RECOVERIES),
        "rankadaptor, recoveries only, no prior": (RankAdaptor(default_prior()), RECOVERIES),
        "rankadaptor-paper": (ALLOCATORS.get("rankadaptor-paper"), RECOVERIES),
        "bayes (GP)": (ALLOCATORS.get("bayes"), RECOVERIES),
        "bayes (TPE)": (ALLOCATORS.get("bayes-tpe"), RECOVERIES),
        "gradient": (ALLOCATORS.get("gradient"), RECOVERIES),
        "proportional": (ALLOCATORS.get("proportional"), RECOVERIES),
    }


@dataclass(frozen=True)
class Job:
    """One search of one section."""

    section: str
    world: World
    method: str
    seed: int

    def key(self) -> tuple[str, ...]:
        return self.section, str(self.world.layers), self.method, f"{self.world.noise:g}", self.world.name, str(self.seed)


def jobs(sections: Sequence[str], seeds: int) -> Iterator[Job]:
    """Yields every search in the order of the tables."""
    if "depth" in sections:
        for layers, method in product((6, 12, 24, 48, 80), ("rankadaptor", "gradient", "proportional")):
            yield from (Job("depth", World(layers), method, seed) for seed in range(seeds))
    if "noise" in sections:
        for noise, layers in product((0.05, 0.2, 0.5), (12, 48)):
            yield from (Job("noise", World(layers, noise), "rankadaptor", seed) for seed in range(seeds))
    if "worlds" in sections:
        harder = (
            World(24, interaction=0.15, name="with interactions of 15 %"),
            World(24, elastic_error=0.5, name="elastic adapter off by 0.5"),
            World(24, told=0.0, name="features tell nothing"),
        )
        for world in harder:
            yield from (Job("worlds", world, "rankadaptor", seed) for seed in range(seeds))
    if "methods" in sections:
        for method in (
            "rankadaptor, recoveries only",
            "rankadaptor, recoveries only, no prior",
            "rankadaptor-paper",
            "bayes (GP)",
            "bayes (TPE)",
        ):
            yield from (Job("methods", World(12), method, seed) for seed in range(seeds))
    if "flat" in sections:
        for layers in (12, 48):
            yield from (Job("flat", World(layers, flat=True, name="flat"), "rankadaptor", seed) for seed in range(2 * seeds))


def run(job: Job) -> dict[str, object]:
    """Runs one search and its confirmation."""
    planted, started = Planted(job.world, job.seed), time.perf_counter()
    method, schedule = methods()[job.method]
    if isinstance(method, ClosedForm):
        found, history, compared = method.allocate(planted.space), list[RankTrial](), None
    else:
        found, history = planted.search(method, schedule)
        tried = {trial.ranks for trial in history if trial.kind == "recovery"}
        closed = {proposal.ranks for proposal in first_vectors(planted.space)} & tried
        compared = finalists(planted.space, history, method, found, closed)
    seconds = time.perf_counter() - started
    kept, confirming = planted.confirmed(compared) if compared is not None else (found, 0.0)
    share = planted.gain(kept) / planted.attainable if not job.world.flat else 0.0
    origin = "uniform" if kept == planted.uniform else "found" if kept == found else "closed form"
    values = (*job.key(), f"{share:.4f}", f"{sum(trial.cost for trial in history) + confirming:.3f}", f"{seconds:.1f}", origin)
    return dict(zip(FIELDS, values, strict=True))


def prior_rows(seeds: int) -> list[dict[str, object]]:
    """The gain of a start from past searches: recoveries alone, at a half and at the whole cost, of 12 layers."""
    past: list[PastSearch] = []
    for seed in range(1000, 1012):
        planted = Planted(World(12), seed)
        vectors = [planted.uniform, *random_vectors(planted.space, 15, {planted.uniform}, np.random.default_rng(seed))]
        request = Request(tuple(Proposal(ranks, "random") for ranks in vectors), 0.25, "recovery", 0.0)
        past.append(PastSearch(planted.space, tuple(planted.measure(request, ())), "planted", 1, 0.2))
    training = train(past)
    rows: list[dict[str, object]] = []
    for (name, prior), limit, seed in product((("default", default_prior()), ("trained", training.prior)), STARTS, range(seeds)):
        planted, started = Planted(World(12), seed), time.perf_counter()
        ranks, history = planted.search(RankAdaptor(prior), Schedule(STARTS[limit], cost_limit=limit))
        share = planted.gain(ranks) / planted.attainable
        spent, seconds = sum(trial.cost for trial in history), time.perf_counter() - started
        values = ("prior", "12", f"{name} prior, cost limit {limit:g}", "0.1", "concave", str(seed))
        rows.append(dict(zip(FIELDS, (*values, f"{share:.4f}", f"{spent:.3f}", f"{seconds:.1f}", ""), strict=True)))
    return rows


def section_table(rows: Sequence[dict[str, str]], section: str) -> list[str]:
    """One Markdown table: mean share with a 95 % interval over seeds, least share, cost, seconds, what confirmation kept."""
    body: list[list[str]] = []
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["section"] == section:
            groups.setdefault((row["layers"], row["noise"], row["world"], row["method"]), []).append(row)
    for (layers, noise, world, method), members in groups.items():
        shares = [float(row["share"]) for row in members]
        half = 1.96 * statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
        cost, seconds = (statistics.mean(float(row[name]) for row in members) for name in ("cost", "seconds"))
        kept = {origin: sum(row["kept"] == origin for row in members) for origin in ("found", "closed form", "uniform")}
        told = ", ".join(f"{count} {origin}" for origin, count in kept.items() if count) if cost else ""
        share = f"{statistics.mean(shares):.3f} ± {half:.3f}" if section != "flat" else ""
        least = f"{min(shares):.2f}" if section != "flat" else ""
        body.append([layers, noise, world, method, str(len(members)), share, least, f"{cost:.2f}", f"{seconds:.1f}", told])
    head = ["layers", "noise", "objective", "method", "searches", "share of the attainable gain", "least", "cost", "seconds", "kept"]
    return table(head, body)


TITLES = {
    "depth": "Depth: noise 10 % of the attainable gain, default schedule",
    "noise": "Noise",
    "worlds": "Harder objectives",
    "methods": "Other methods, recoveries only (no elastic adapter), 12 layers",
    "prior": "Start from a prior that was trained on 12 other searches of the same kind (16 recoveries of a quarter each), recoveries only",
    "flat": "Flat objective: what is kept after a search that had nothing to find (anything but uniform is a false alarm)",
}


def report(rows: Sequence[dict[str, str]]) -> str:
    """The page of results."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "scikit-learn", "optuna", "torch"))
    lines = [
        "# Rank allocation on planted objectives",
        "",
        "Made by `benchmarks/rank_allocation_planted.py`, whose head says what is planted. Share: gain of the ranks that are kept over uniform,",
        "without noise, over that of the best vector; mean over seeds 0, 1, … with a 95 % interval. Cost: in full recoveries, confirmation",
        "included.",
        "",
        f"{libraries}; Python {platform.python_version()}, {os.cpu_count()} CPU cores, {platform.machine()}.",
    ]
    for section, title in TITLES.items():
        if any(row["section"] == section for row in rows):
            lines += ["", f"## {title}", "", *section_table(rows, section)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=tuple(TITLES))
    parser.add_argument("--work", type=Path, default=Path("runs/rank_allocation_planted"))
    parser.add_argument("--seeds", type=int, default=8)
    given = parser.parse_args()
    sections = given.section or tuple(TITLES)
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "searches.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    done = {tuple(row[name] for name in FIELDS[:6]) for row in rows}

    def keep(new: Sequence[dict[str, object]]) -> None:
        with path.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, FIELDS)
            if stream.tell() == 0:
                writer.writeheader()
            writer.writerows(new)

    for job in jobs(sections, given.seeds):
        if job.key() not in done:
            keep([run(job)])
            print(*job.key(), flush=True)
    if "prior" in sections and not any(row["section"] == "prior" for row in rows):
        keep(prior_rows(given.seeds))
    places = {job.key(): place for place, job in enumerate(jobs(tuple(TITLES), given.seeds))}
    rows = sorted(
        csv.DictReader(path.open(encoding="utf-8")), key=lambda row: places.get(tuple(row[name] for name in FIELDS[:6]), len(places))
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rank_allocation_planted.md").write_text(report(rows), encoding="utf-8")
    with (RESULTS / "rank_allocation_planted.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
