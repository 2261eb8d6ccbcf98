"""Low-rank compression measured: every method and choice of ranks at one budget, beside pruning, on text of the domain and of another.

    python benchmarks/compression.py [--only quality|bayes|prune|mix|damage|pifa|tables] [--model NAME=FOLDER] [--ratios 0.2 0.3] [--draws N]

* ``quality``: held-out loss of all methods x choices of ranks, over calibration draws, at 10 to 50 % of all stored parameters.
* ``bayes``: Bolaco's search with 50 trials, and the same on our prices; its cost in forward passes.
* ``prune``: pruned models of the same number of parameters.
* ``mix``: channels and ranks in one knapsack, and what each part of each layer loses in it.
* ``damage``: predicted against measured damage of one layer at a time.
* ``pifa``: bytes and speed of PIFA's layout beside plain factors and the dense matrix.

Models: stories3M, calibrated on TinyStories, where the folder ``shared`` lies beside the checkout; the built-in seedling, on its own text; and
what ``--model`` names, on WikiText-2. Calibration text and held-out text are different documents. The other domain is text that nothing was
fitted to: WikiText-2 for the first two, TinyStories for others. Nothing is chosen by held-out text. The loss of each window of 128 tokens is kept,
so that differences between methods have paired intervals. Rows go to ``benchmarks/results/compression_*.csv``; a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import common
from regraft.compression import COMPRESSORS, RANK_CHOICES, Decomposed, decompose, factor_space, gather
from regraft.data.text import Corpus, read_corpus
from regraft.data.tokens import calibration_windows
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.uneven.factored_regraft import FactoredLinear
from regraft.models.view import ModelView, parameter_count
from regraft.pipelines.compress import compress
from regraft.pipelines.compress.prepare import projections_of
from regraft.pipelines.compress.search import RankSearch, searched_ranks
from regraft.pipelines.prune.prune import prune
from regraft.plans import FactorSpace
from regraft.settings import CompressSettings, PruneSettings
from regraft.surgery.trial_ranks import TrialModel, measured_damage

SHARED = Path(__file__).parents[2] / "shared"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
WINDOW, CALIBRATION, TESTED, JUDGED = 128, 128, 48, 16
COMBINATIONS = (
    ("svd", "uniform"),
    ("asvd", "uniform"),
    ("asvd", "knapsack"),
    ("svd_llm", "uniform"),
    ("svd_llm", "knapsack"),
    ("bolaco", "uniform"),
    ("bolaco", "knapsack"),
    ("fisher", "uniform"),
    ("fisher", "type"),
    ("fisher", "closed"),
    ("fisher", "knapsack"),
)
REFERENCE = "fisher knapsack"
QUALITY = common.RESULTS / "compression_quality.csv"
DAMAGE = common.RESULTS / "compression_damage.csv"
PIFA = common.RESULTS / "compression_pifa.csv"
MIX = common.RESULTS / "compression_mix.csv"
TABLES = common.RESULTS / "compression.md"


@dataclass
class Subject:
    """A model and its texts."""

    name: str
    folder: str
    calibration: Corpus
    domain: Corpus
    other: Corpus

    @cached_property
    def loaded(self) -> Loaded:
        found = load(self.folder)
        found.model.float()
        return found

    def windows(self, corpus: Corpus, count: int, seed: int) -> Tensor:
        return calibration_windows(corpus, require_tokenizer(self.loaded), count, WINDOW, seed)

    @cached_property
    def tests(self) -> dict[str, Tensor]:
        return {"domain": self.windows(self.domain, TESTED, 99), "other": self.windows(self.other, TESTED, 99)}

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Windows to fit on, and windows to judge ranks on."""
        windows = self.windows(self.calibration, CALIBRATION + JUDGED, seed)
        return windows[:CALIBRATION], windows[CALIBRATION:]


def subjects(extra: Sequence[str]) -> Iterator[Subject]:
    stories = _halves(read_corpus(SHARED / "data" / "tinystories" / "train.txt", "train")) if SHARED.is_dir() else None
    wiki = read_corpus(SHARED / "data" / "wikitext2" / "valid.txt", "train") if SHARED.is_dir() else read_corpus(None, "test")
    if stories is not None:
        yield Subject("stories3M", str(SHARED / "models" / "stories3M"), *stories, wiki)
    yield Subject("seedling", "seedling", read_corpus(None, "validation"), read_corpus(None, "test"), wiki)
    for text in extra:
        name, _, folder = text.partition("=")
        assert stories is not None, "other models are calibrated on WikiText-2, which lies in the folder `shared`"
        yield Subject(name, folder, *_halves(wiki), stories[1])


def _halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Documents to calibrate on, and others to test with; the halves of a text that is one document."""
    documents = corpus.documents
    if len(documents) == 1:
        middle = len(documents[0]) // 2
        documents = (documents[0][:middle], documents[0][middle:])
    middle = len(documents) // 2
    return Corpus(corpus.name, "first half", documents[:middle]), Corpus(corpus.name, "second half", documents[middle:])


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> list[float]:
    """Nats per token of every window."""
    found: list[float] = []
    for ids in windows.split(8):
        logits = model(input_ids=ids).logits[:, :-1].float()
        nats = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found += nats.view(len(ids), -1).mean(dim=1).tolist()
    return found


def decomposed(subject: Subject, windows: Tensor, methods: Sequence[str], seed: int) -> dict[str, list[Decomposed]]:
    """All methods on the same evidence."""
    view = ModelView(subject.loaded.model)
    projections = projections_of(view)
    start = f"{view.family.layers}."
    found: dict[str, list[Decomposed]] = {method: [] for method in methods}
    for evidence in gather(view.model, projections, windows, "gradients", transposed=view.family.transposed, seed=seed):
        for method in methods:
            found[method] += decompose(
                [evidence],
                COMPRESSORS.get(method),
                "plain",
                lambda name: int(name.removeprefix(start).partition(".")[0]),
                lambda name: projections[name]._parameters.get("bias") is not None,
            )
    return found


def space_of(subject: Subject, method: str, parts: Sequence[Decomposed], ratio: float) -> FactorSpace:
    unit = "nats" if COMPRESSORS.get(method).unit == "nats" else "share"
    return factor_space(
        [one.priced for one in parts],
        fingerprint=subject.loaded.fingerprint,
        method=method,
        unit=unit,
        layout="plain",
        parameters=parameter_count(subject.loaded.model),
        ratio=ratio,
    )


class Rows:
    """What is measured already, and the file that it goes to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {(row["model"], row["way"], row["ratio"], row["draw"]) for row in common.read_rows(path)}

    def missing(self, subject: Subject, way: str, ratio: float, draw: int) -> bool:
        return (subject.name, way, f"{ratio:g}", str(draw)) not in self.known

    def add(
        self, subject: Subject, way: str, ratio: float, draw: int, model: nn.Module, parameters: int, passes: int, seconds: float
    ) -> None:
        values = {name: losses(model, windows) for name, windows in subject.tests.items()}
        row = {"model": subject.name, "way": way, "ratio": f"{ratio:g}", "draw": draw, "parameters": parameters}
        row |= {f"{name}_nats": f"{sum(found) / len(found):.5f}" for name, found in values.items()}
        row |= {"search_windows": passes, "seconds": f"{seconds:.1f}"}
        row |= {f"{name}_windows": " ".join(f"{value:.4f}" for value in found) for name, found in values.items()}
        common.add_row(self.path, row)
        shown = " ".join(f"{name} {sum(found) / len(found):.4f}" for name, found in values.items())
        print(f"{subject.name} {ratio:g} draw {draw} {way}: {shown}", flush=True)


def quality(subject: Subject, ratios: Sequence[float], draws: int) -> None:
    rows = Rows(QUALITY)
    model = subject.loaded.model
    if rows.missing(subject, "dense", 0.0, 0):
        rows.add(subject, "dense", 0.0, 0, model, parameter_count(model), 0, 0.0)
    for draw in range(draws):
        wanted = [(ratio, way) for ratio in ratios for way in COMBINATIONS if rows.missing(subject, " ".join(way), ratio, draw)]
        if not wanted:
            continue
        fitted, _ = subject.draw(draw)
        found = decomposed(subject, fitted, tuple(dict.fromkeys(method for method, _ in COMBINATIONS)), draw)
        for method in found:
            trial = TrialModel(model, {one.priced.name: one.truncation for one in found[method]})
            for ratio, (own, choice) in wanted:
                if own == method:
                    start = time.perf_counter()
                    space = space_of(subject, method, found[method], ratio)
                    ranks = RANK_CHOICES.get(choice)(space)
                    seconds = time.perf_counter() - start
                    put(trial, space, ranks)
                    rows.add(subject, f"{method} {choice}", ratio, draw, trial.model, after(space, ranks), 0, seconds)


def bayes(subject: Subject, ratios: Sequence[float], draws: int, trials: int = 50) -> None:
    rows = Rows(QUALITY)
    model = subject.loaded.model
    ways = [("bolaco", 1), ("bolaco", 4), ("fisher", 1), ("fisher measured", 0)]
    for draw in range(draws):
        names = {(method, groups): f"{method} knapsack" if not groups else f"{method} bayes 5x{groups}" for method, groups in ways}
        wanted = [(way, ratio) for way in ways for ratio in ratios if rows.missing(subject, names[way], ratio, draw)]
        if not wanted:
            continue
        fitted, judging = subject.draw(draw)
        found = decomposed(subject, fitted, ("bolaco", "fisher"), draw)
        for (method, groups), ratio in wanted:
            parts = found[method.partition(" ")[0]]
            truncations = {one.priced.name: one.truncation for one in parts}
            space = space_of(subject, method.partition(" ")[0], parts, ratio)
            trial = TrialModel(model, truncations)
            start = time.perf_counter()
            if groups:
                with tempfile.TemporaryDirectory() as folder:
                    how = RankSearch(trials, groups, 1e-3, identity={}, folder=Path(folder), seed=draw)
                    ranks = searched_ranks(model, truncations, space, judging, how, lambda line: None)
                passes = trials * len(judging)
            else:
                damage = measured_damage(model, space, truncations, judging)
                sites = tuple(replace(one, damage=damage[one.name]) for one in space.sites)
                ranks = RANK_CHOICES.get("knapsack")(replace(space, sites=sites))
                passes = 8 * len(space.sites)  # two ranks of every layer on eight windows, half of the layers each on average
            seconds = time.perf_counter() - start
            put(trial, space, ranks)
            rows.add(subject, names[method, groups], ratio, draw, trial.model, after(space, ranks), passes, seconds)


def pruned(subject: Subject, ratios: Sequence[float], draws: int) -> None:
    rows = Rows(QUALITY)
    with _calibration(subject) as text:
        for draw, ratio in product(range(draws), ratios):
            if rows.missing(subject, "pruned", ratio, draw):
                start = time.perf_counter()
                settings = PruneSettings(
                    ratio=ratio, calibration=text, samples=CALIBRATION, shape="per-layer", cache=text.with_name(f"cache-{draw}")
                )
                done = prune(subject.folder, None, settings, seed=draw).model
                assert done is not None
                done.float()
                rows.add(subject, "pruned", ratio, draw, done, parameter_count(done), 0, time.perf_counter() - start)


def mix(subject: Subject, ratios: Sequence[float], draws: int) -> None:
    """Channels and ranks together, and how many parts of the model lose which."""
    rows = Rows(QUALITY)
    with _calibration(subject) as text:
        for draw, ratio in product(range(draws), ratios):
            if not rows.missing(subject, "mix", ratio, draw):
                continue
            start = time.perf_counter()
            settings = CompressSettings(
                ratio=ratio, mix=True, calibration=text, samples=CALIBRATION + JUDGED, cache=text.with_name("moments")
            )
            done = compress(subject.folder, None, settings, seed=draw)
            assert done.model is not None
            done.model.float()
            rows.add(subject, "mix", ratio, draw, done.model, parameter_count(done.model), 0, time.perf_counter() - start)
            cut = {entry.group for entry in done.pruned.cuts} if done.pruned is not None else set[str]()
            layers = len(ModelView(subject.loaded.model).layers)
            for part, group, inside in (("attention", "heads", "attn"), ("feed-forward", "ffn", "mlp")):
                narrowed = sum(name.endswith(f".{group}") for name in cut)
                factored = {entry.module.rpartition(".")[0] for entry in done.plan.factorings if inside in entry.module}
                row = {"model": subject.name, "ratio": f"{ratio:g}", "draw": draw, "part": part, "channels": narrowed}
                common.add_row(MIX, row | {"ranks": len(factored), "whole": layers - narrowed - len(factored)})


@contextmanager
def _calibration(subject: Subject) -> Iterator[Path]:
    """Gives a file of the calibration text, in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.txt"
        text.write_text("\n<|endoftext|>\n".join(subject.calibration.documents), encoding="utf-8")
        yield text


def put(trial: TrialModel, space: FactorSpace, ranks: Sequence[int]) -> None:
    trial.set({site.name: rank for site, rank in zip(space.sites, ranks, strict=True) if rank < site.full_rank})


def after(space: FactorSpace, ranks: Sequence[int]) -> int:
    return space.parameters - space.dense + space.stored(ranks)


def damage(subject: Subject) -> None:
    """Predicted and measured damage of every layer alone, at three ranks each."""
    if any(row["model"] == subject.name for row in common.read_rows(DAMAGE)):
        return
    fitted, judging = subject.draw(0)
    parts = decomposed(subject, fitted, ("fisher",), 0)["fisher"]
    space = space_of(subject, "fisher", parts, 0.2)
    truncations = {one.priced.name: one.truncation for one in parts}
    found = measured_damage(subject.loaded.model, space, truncations, judging)
    for site in space.sites:
        factored = site.ranks[:-1]
        for share in (0.35, 0.7):
            rank = min(factored, key=lambda rank, share=share, factored=factored: abs(rank - share * factored[-1]))
            place = site.ranks.index(rank)
            row = {"model": subject.name, "site": site.name, "rank": rank, "predicted_nats": f"{site.damage[place]:.6g}"}
            common.add_row(DAMAGE, row | {"measured_nats": f"{found[site.name][place]:.6g}"})


@torch.no_grad()
def pifa() -> None:
    """Numbers, bytes and milliseconds of a square layer at half of its rank, each the shortest of many turns."""
    torch.manual_seed(0)
    done: list[dict[str, object]] = []
    for width in (512, 1024, 2048):
        for rank in (width // 4, width // 2):
            layers = {"dense": nn.Linear(width, width, bias=False)}
            layers |= {layout: FactoredLinear(width, width, rank, layout=layout) for layout in ("plain", "pifa")}
            for tokens in (1, 256):
                rows = torch.randn(tokens, width)
                shortest = dict.fromkeys(layers, math.inf)
                for _ in range(60):
                    for name, layer in layers.items():
                        start = time.perf_counter()
                        layer(rows)
                        shortest[name] = min(shortest[name], 1e3 * (time.perf_counter() - start))
                for name, layer in layers.items():
                    tensors = [*layer.parameters(), *layer.buffers()]
                    done.append(
                        {
                            "width": width,
                            "rank": rank,
                            "tokens": tokens,
                            "layout": name,
                            "numbers": sum(parameter.numel() for parameter in layer.parameters()),
                            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
                            "milliseconds": f"{shortest[name]:.4f}",
                        }
                    )
    common.write_rows(PIFA, done)


def tables() -> None:
    lines = ["# Low-rank compression", "", f"Machine: {common.machine()}. {common.versions('torch', 'transformers', 'optuna')}.", ""]
    rows = common.read_rows(QUALITY)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += _quality_tables(model, own)
    lines += _mix_table()
    lines += _damage_table()
    lines += _pifa_table()
    TABLES.write_text("\n".join(lines), encoding="utf-8")


def _quality_tables(model: str, rows: list[dict[str, str]]) -> list[str]:
    lines = [f"## {model}", ""]
    dense = next(row for row in rows if row["way"] == "dense")
    ratios = sorted({row["ratio"] for row in rows if row["way"] != "dense"}, key=float)
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != "dense"))
    for part, words in (("domain", "the domain of the calibration text"), ("other", "a domain that nothing was fitted to")):
        lines += [
            f"Held-out loss on {words}, nats per token; dense {float(dense[f'{part}_nats']):.3f}. In brackets what `{REFERENCE}` gains over",
            "it on the same windows and draws, with the half width of its 95 % interval over windows.",
            "",
        ]
        body: list[list[str]] = []
        for way in ways:
            cells = [way]
            for ratio in ratios:
                here = {row["draw"]: row for row in rows if row["way"] == way and row["ratio"] == ratio}
                there = {row["draw"]: row for row in rows if row["way"] == REFERENCE and row["ratio"] == ratio}
                cells.append(_cell(here, there, part, own=way == REFERENCE))
            body.append(cells)
        lines += common.table(["method, ranks", *(f"{100 * float(ratio):.0f} %" for ratio in ratios)], body)
    costs = [(row["way"], row["ratio"], row["search_windows"], row["seconds"]) for row in rows if row["search_windows"] != "0"]
    if costs:
        lines += ["Cost of each search, in forward passes of one window and in seconds on a shared machine:", ""]
        lines += common.table(["method, ranks", "share removed", "windows", "seconds"], costs)
    return lines


def _cell(here: dict[str, dict[str, str]], there: dict[str, dict[str, str]], part: str, *, own: bool) -> str:
    if not here:
        return ""
    mean = sum(float(row[f"{part}_nats"]) for row in here.values()) / len(here)
    both = sorted(set(here) & set(there))
    if own or not both:
        return f"{mean:.3f}"

    def windows(rows: dict[str, dict[str, str]]) -> list[list[float]]:
        return [[float(value) for value in rows[draw][f"{part}_windows"].split()] for draw in both]

    gaps = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(windows(here), windows(there), strict=True)]
    centre, half = common.interval([sum(column) / len(column) for column in zip(*gaps, strict=True)])
    return f"{mean:.3f} ({centre:+.3f} ± {half:.3f})"


def _mix_table() -> list[str]:
    rows = common.read_rows(MIX)
    if not rows:
        return []
    words = "What the knapsack of channels and ranks does with the parts of the model: how many lose channels, lose ranks, or stay whole."
    head = ["model", "share removed", "draw", "part", "lose channels", "lose ranks", "whole"]
    body = [[row[key] for key in ("model", "ratio", "draw", "part", "channels", "ranks", "whole")] for row in rows]
    return ["## Channels and ranks together", "", words, "", *common.table(head, body)]


def _damage_table() -> list[str]:
    rows = common.read_rows(DAMAGE)
    if not rows:
        return []
    body: list[list[str]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        predicted, measured = ([float(row[key]) for row in own] for key in ("predicted_nats", "measured_nats"))
        ratio = sorted(b / a for a, b in zip(predicted, measured, strict=True))
        found: Any = spearmanr(predicted, measured)  # scipy has no types for the fields of its result
        body.append([model, str(len(own)), common.rounded(found.statistic), f"{ratio[len(ratio) // 2]:.2f}"])
    head = ["model", "layers x ranks", "rank correlation", "median of measured / predicted"]
    words = "Each layer factored alone at two ranks: the price in nats against the divergence measured on text that nothing was fitted to."
    return ["## Predicted and measured damage", "", words, "", *common.table(head, body)]


def _pifa_table() -> list[str]:
    rows = common.read_rows(PIFA)
    if not rows:
        return []
    body: list[list[str]] = []
    for row in rows:
        if row["layout"] == "dense":
            continue
        same = [other for other in rows if all(other[key] == row[key] for key in ("width", "rank", "tokens"))]
        times = {other["layout"]: float(other["milliseconds"]) for other in same}
        versus = [f"{times[name] / times[row['layout']]:.2f}" for name in ("dense", "plain")]
        body.append([row["width"], row["rank"], row["tokens"], row["layout"], row["numbers"], row["bytes"], row["milliseconds"], *versus])
    head = ["width", "rank", "tokens", "layout", "numbers", "bytes", "ms", "times dense", "times plain"]
    words = "A square layer in float32 on one thread; speeds are relative, above 1 is faster."
    return ["## PIFA's layout", "", words, "", *common.table(head, body)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("quality", "bayes", "prune", "mix", "damage", "pifa", "tables"), action="append")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--subject", action="append", default=[], help="names of the models to measure; default: all")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--trials", type=int, default=50)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = given.only or ["quality", "damage", "prune", "mix", "bayes", "pifa"]
    if "pifa" in parts:
        pifa()
    for subject in subjects(given.model) if parts != ["tables"] else ():
        if given.subject and subject.name not in given.subject:
            continue
        for part in parts:
            if part == "quality":
                quality(subject, given.ratios, given.draws)
            elif part == "bayes":
                bayes(subject, given.ratios, given.draws, given.trials)
            elif part == "prune":
                pruned(subject, given.ratios, given.draws)
            elif part == "mix":
                mix(subject, given.ratios, given.draws)
            elif part == "damage":
                damage(subject)
    tables()


if __name__ == "__main__":
    main()
