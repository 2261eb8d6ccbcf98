"""Every allocator at one budget on models that were pruned unevenly: what its ranks recover, and what they cost to find.

    python benchmarks/rank_allocation.py MODEL [TEXT] [--ratios 0.2,0.3,0.5] [--budgets r=8] [--steps 100] [--seeds 5] [--minutes 9] [--tables]

MODEL (``seedling`` without a text, or a folder with one) is pruned by first-order Taylor scores, one threshold for all layers, nothing
re-fitted: layers lose very different shares, and there is much to win back. The text (documents) is divided into calibration, training
with what the searches measure on, and test rows, which no search sees.

Searches run through ``regraft.allocate_ranks`` with its defaults: four full recoveries for elastic scores, short recoveries and a comparison
with uniform on fresh seeds, and uniform is kept unless it is beaten. ``prior`` is the vector of which the shipped prior expects most before
any trial; ``rankadaptor (no prior)`` is the search without that prior, and is kept (``results/searches_elsewhere``) to judge the prior by.
Then every distinct vector is recovered in full on further seeds, all allocators on the same batches from the same first values, and judged
on the test rows after the last step: nothing is chosen by them. For searches the table has what they found as well as what they kept. Beside
the loss stands the accuracy of a four-way choice: 24 tokens of a test document, its next 8 and those of three others; the likeliest 8 are
the answer.

Recoveries are small, for few CPU cores: ``--steps`` of 4 windows of 64 tokens. Every measurement is on disk before the next begins
(``benchmarks/results/rank_allocation_*.csv``, searches in ``--work``), so that a run stops after ``--minutes`` and the next one goes on with
what is missing.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import RESULTS, add_row, interval, machine, read_rows, table, versions
from regraft.adapters import LowRank
from regraft.allocation import ALLOCATORS, PAST, ClosedForm, Ranks, rank_space, shipped_prior
from regraft.allocation.fill import fill, random_vectors
from regraft.allocation.fitting import fit
from regraft.atomic import write_text
from regraft.data.text import Corpus, read_corpus
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.view import ModelView
from regraft.paired.candidates import Candidates
from regraft.paired.elastic import Elastic, ElasticSettings, agreement
from regraft.paired.setup import PairedSetup
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.ranks.allocate import allocate_ranks
from regraft.pipelines.ranks.layer_features import bare_slots, measured_slots
from regraft.pipelines.recover import training_corpora
from regraft.plans import PastSearch, RankSearch, RankSpace, RankTrial, from_json, to_json
from regraft.settings import AllocateSettings, LoadSettings, PruneSettings, RecoverSettings
from regraft.training.batches import make_examples, spread
from regraft.training.losses import mean_loss

RECOVERED, SEARCHED = RESULTS / "rank_allocation_recoveries.csv", RESULTS / "rank_allocation_searches.csv"
SEARCHES = RESULTS / "searches_elsewhere"
MODELS, ELASTIC = RESULTS / "rank_allocation_models.csv", RESULTS / "rank_allocation_elastic.csv"
BATCH, TOKENS, LR, TEST_WINDOWS = 4, 64, 3e-3, 96
QUESTIONS, CONTEXT, ANSWER = 64, 24, 8
CHOICES = {"r=8": (2, 4, 6, 8, 10, 12), "r=4": (1, 2, 3, 4, 6, 8), "r=2": (1, 2, 3, 4, 6, 8)}
CALIBRATION, TRAINING, TEST = (0.0, 0.15), (0.15, 0.9), (0.9, 1.0)
FIRST_SEED = 100
UNTRAINED = "rankadaptor (no prior)"
METHODS = ("uniform", "proportional", "gradient", "eva", "prior", "adalora", UNTRAINED, "rankadaptor", "bayes")
FLOAT32 = LoadSettings(dtype="float32")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One pruned model under one budget, recovered for so many steps."""

    model: str
    ratio: float
    steps: int
    budget: str

    def key(self) -> dict[str, str]:
        return {"model": self.model, "ratio": f"{self.ratio:g}", "steps": str(self.steps), "budget": self.budget}


class Bench:
    """A pruned model with its texts.

    Args:
        source: As the user names the model.
        text: Documents; None for those of the embedded model.
        ratio: Share of all parameters that is removed.
        steps: Number of steps of a full recovery.
        work: Folder of the pruned model, the texts and the searches.
    """

    def __init__(self, source: str, text: Path | None, ratio: float, steps: int, work: Path) -> None:
        self.work = work / f"{Path(source).name}-{ratio:g}-{steps}"
        self.work.mkdir(parents=True, exist_ok=True)
        calibration, data, self.test = divided(text, self.work) if text else (None, None, read_corpus(None, "test"))
        self.folder = self.work / "pruned"
        if not self.folder.is_dir():
            settings = PruneSettings(
                ratio=ratio, criterion="taylor", select="global", reconstruct="none", shape="per-layer", samples=32, seq_len=TOKENS,
                calibration=calibration,
            )  # fmt: skip
            prune(source, self.folder, settings, load=FLOAT32)
        self.settings = RecoverSettings(
            data=data, held_out=0.12, steps=steps, batch=BATCH, seq_len=TOKENS, lr=LR, dropout=0.0, eval_every=steps, held_out_windows=24,
            precision="float32",
        )  # fmt: skip
        self.dense: Loaded = load(source, FLOAT32)
        self.pruned: Loaded = load(self.folder, FLOAT32)
        self.tokenizer = require_tokenizer(self.dense)

    def space(self, budget: str) -> RankSpace:
        """Returns the slots with all features, so that every closed form can answer; measured once."""
        kept = self.work / f"space-{budget.replace('=', '')}.json"
        if kept.is_file():
            return from_json(RankSpace, kept.read_text(encoding="utf-8"))
        ranks = CHOICES[budget]
        settings = AllocateSettings(method="adalora", budget=budget, ranks=ranks)
        bare = bare_slots(ModelView(self.pruned.model), "layer")
        train, _ = training_corpora(self.settings, 0, self.pruned)
        slots = measured_slots(self.pruned, bare, train, settings, self.settings, seed=0, say=lambda _: None)
        space = rank_space(self.pruned.fingerprint, "layer", slots, ranks, budget)
        write_text(kept, to_json(space))
        return space

    def ground(self, space: RankSpace, held_out: Corpus | None = None) -> PairedSetup:
        """Returns what recoveries are measured on: the test rows, or others."""
        train, search = training_corpora(self.settings, 0, self.pruned)
        modules = [name for slot in space.slots for name in slot.modules]
        windows = self.settings.held_out_windows if held_out is None else TEST_WINDOWS
        settings = self.settings.model_copy(update={"held_out_windows": windows})
        return PairedSetup(self.pruned.model, self.tokenizer, train, held_out or search, modules, settings)

    def test_ids(self) -> Tensor:
        rows = spread(make_examples(self.test, self.tokenizer, TOKENS, wanted=TEST_WINDOWS, seed=0), TEST_WINDOWS)
        return torch.stack([row.input_ids for row in rows])

    def questions(self) -> Tensor:
        """Returns four-way choices, (Q, 4, context + answer) int64; the first is the true continuation."""
        rows = spread(make_examples(self.test, self.tokenizer, CONTEXT + ANSWER, wanted=4 * QUESTIONS, seed=2), QUESTIONS)
        ids = torch.stack([row.input_ids for row in rows])
        others = [torch.roll(ids, shift, dims=0) for shift in (0, 7, 19, 31)]
        return torch.stack([torch.cat([ids[:, :CONTEXT], other[:, CONTEXT:]], dim=1) for other in others], dim=1)


def divided(text: Path, work: Path) -> tuple[Path, Path, Corpus]:
    """Divides a text by documents, in their order: files for calibration and training, and the rest for the test."""
    documents = read_corpus(text, "train").documents
    count = len(documents)

    def part(share: tuple[float, float]) -> tuple[str, ...]:
        return documents[int(share[0] * count) : int(share[1] * count)]

    files = work / "calibration.txt", work / "training.txt"
    for file, share in zip(files, (CALIBRATION, TRAINING), strict=True):
        write_text(file, "<|endoftext|>".join(part(share)))
    return *files, Corpus(f"{text.name} (test)", "train", part(TEST))


@torch.no_grad()
def accuracy(model: PreTrainedModel, asked: Tensor) -> float:
    """Returns the share of questions whose true continuation is the likeliest."""
    right = 0
    for part in asked.split(16):
        ids = part.flatten(0, 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, CONTEXT - 1 : -1].float().log_softmax(-1)
        nats = -logits.gather(-1, ids[:, CONTEXT:, None]).sum((1, 2))
        right += int((nats.reshape(-1, 4).argmin(1) == 0).sum())
    return right / len(asked)


def accuracy_with(model: PreTrainedModel, change: Mapping[str, LowRank], asked: Tensor) -> float:
    """Returns the same with a recovery folded into the weights for as long as it takes."""
    modules = ModelView(model).adapted_modules()
    kept = {name: modules[name].weight.data.clone() for name in change}
    for name, low_rank in change.items():
        modules[name].weight.data += low_rank.left @ low_rank.right
    found = accuracy(model, asked)
    for name, weight in kept.items():
        modules[name].weight.data.copy_(weight)
    return found


def stop_after(deadline: float) -> None:
    if time.monotonic() > deadline:
        write_tables()
        sys.exit("time is up: call again for the rest")


def matches(row: Mapping[str, str], key: Mapping[str, Any]) -> bool:
    return all(row[name] == str(value) for name, value in key.items())


def searched(case: Case, bench: Bench, method: str) -> RankSearch:
    """Runs a search with the defaults of the package, or reads what it found; one that was stopped goes on."""
    slug = "".join(letter for letter in f"{method}-{case.budget}".replace(" ", "-") if letter not in "()=")
    output = bench.work / f"{slug}.json"
    record = output.with_suffix(".search") / "search.json"
    began = time.perf_counter()
    if not record.is_file():
        name, prior = ("rankadaptor", "none") if method == UNTRAINED else (method, "shipped")
        settings = AllocateSettings(method=name, budget=case.budget, ranks=CHOICES[case.budget], prior=prior)
        allocate_ranks(bench.folder, output, settings, bench.settings, load=FLOAT32, seed=0, resume=True)
    found = from_json(RankSearch, record.read_text(encoding="utf-8"))
    if method == UNTRAINED:
        past = from_json(PastSearch, record.with_name(PAST).read_bytes())
        name = f"{case.model}-{case.ratio:g}-{case.budget.replace('=', '')}"
        write_text(SEARCHES / f"{name}.json", to_json(replace(past, model=case.model)) + "\n")
    key = {**case.key(), "method": method}
    if not any(matches(row, key) for row in read_rows(SEARCHED)):
        add_row(SEARCHED, {
            **key, "found": text_of(found.found), "confirmed": int(text_of(kept_of(found)) == text_of(found.found)), "trials": len(found.trials),
            "cost": round(found.search_cost, 2), "confirming_cost": round(found.confirming_cost, 2),
            "minutes": round((time.perf_counter() - began) / 60, 2),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "r2": round(found.error.r2, 3) if found.error else "",
            "rank_correlation": round(found.error.rank_correlation, 3) if found.error else "",
        })  # fmt: skip
    return found


def kept_of(found: RankSearch) -> Ranks:
    """Returns the ranks that a search ends with: those it found, or uniform."""
    return found.confirmation.kept if found.confirmation is not None else found.space.uniform_ranks


def text_of(ranks: Ranks) -> str:
    return " ".join(map(str, ranks))


def answers(case: Case, space: RankSpace, bench: Bench, methods: Sequence[str], deadline: float) -> Iterator[tuple[str, Ranks]]:
    """Yields what each allocator answers; searches twice, as found and as kept; ``prior``: the best that the shipped prior expects."""
    for method in methods:
        if method == "prior":
            yield method, fill(space, fit(space, (), shipped_prior()).table())
            continue
        allocator = ALLOCATORS.get("rankadaptor" if method == UNTRAINED else method)
        if isinstance(allocator, ClosedForm):
            yield method, allocator.allocate(space)
        else:
            stop_after(deadline)
            found = searched(case, bench, method)
            yield f"{method}, as found", found.found
            yield method, kept_of(found)


def compare(case: Case, bench: Bench, methods: Sequence[str], seeds: int, deadline: float) -> None:
    """Recovers every distinct vector on fresh seeds, all vectors of a seed side by side, and adds a row for each allocator."""
    space = bench.space(case.budget)
    answered = dict(answers(case, space, bench, methods, deadline))
    candidates = Candidates(bench.ground(space, bench.test), space)
    asked = bench.questions()
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        rows = [row for row in read_rows(RECOVERED) if matches(row, {**case.key(), "seed": seed})]
        missing = [name for name in answered if not any(row["method"] == name for row in rows)]
        if not missing:
            continue
        stop_after(deadline)
        distinct = sorted({answered[name] for name in missing} - {vector_of(row["ranks"]) for row in rows})
        measured = {vector_of(row["ranks"]): (row["loss_nats"], row["accuracy"]) for row in rows}
        for ranks, trial in zip(distinct, candidates.measure(distinct, 1.0, seed), strict=True):
            change = candidates.change(ranks, seed)
            right = accuracy_with(bench.pruned.model, change, asked) if change else 0.0
            measured[ranks] = f"{trial.loss_nats:.6f}" if trial.loss_nats is not None else "", f"{right:.4f}"
        for name in missing:
            ranks = answered[name]
            loss, right = measured[ranks]
            add_row(RECOVERED, {
                **case.key(), "method": name, "seed": seed, "ranks": text_of(ranks), "parameters": space.cost(ranks), "loss_nats": loss,
                "accuracy": right,
            })  # fmt: skip


def vector_of(text: str) -> Ranks:
    return tuple(map(int, text.split()))


def reference(case: Case, bench: Bench, space: RankSpace) -> None:
    """Adds the dense and the pruned model, before any recovery."""
    key = {name: value for name, value in case.key().items() if name in ("model", "ratio")}
    if any(matches(row, key) for row in read_rows(MODELS)):
        return
    asked, ids = bench.questions(), bench.test_ids()
    batches = [{"input_ids": part, "labels": part} for part in ids.split(16)]
    add_row(MODELS, {
        **key, "shares_pruned": " ".join(f"{slot.features['share_pruned']:.2f}" for slot in space.slots),
        "dense_loss": round(mean_loss(bench.dense.model, batches, CPU), 5), "pruned_loss": round(mean_loss(bench.pruned.model, batches, CPU), 5),
        "dense_accuracy": round(accuracy(bench.dense.model, asked), 4), "pruned_accuracy": round(accuracy(bench.pruned.model, asked), 4),
    })  # fmt: skip


def elastic(case: Case, bench: Bench, count: int) -> None:
    """Compares elastic scores with full recoveries of random vectors, for several ways of training the elastic adapter."""
    space = bench.space(case.budget)
    uniform = space.uniform_ranks
    drawn = [uniform, *random_vectors(space, count - 1, {uniform}, np.random.default_rng(7))]
    ground = bench.ground(space)
    real = Candidates(ground, space).measure(drawn, 1.0, 0)
    short = Candidates(ground, space).measure(drawn, 0.125, 0)
    again = Candidates(ground, space).measure(drawn, 1.0, 1)
    scores = {
        "full recovery on another seed": [replace(trial, kind="elastic") for trial in again],
        "recovery of 1/8 of the steps": [replace(trial, kind="elastic") for trial in short],
    }
    for name, settings in {
        "1 vector a step, an eighth of the steps": ElasticSettings(0.125, 1),
        "2 vectors a step, an eighth of the steps": ElasticSettings(0.125, 2),
        "1 vector a step, a quarter of the steps": ElasticSettings(0.25, 1),
        "2 vectors a step, a quarter of the steps": ElasticSettings(0.25, 2),
        "2 vectors a step, half the steps": ElasticSettings(0.5, 2),
        "sandwich of 4, a quarter of the steps": ElasticSettings(0.25, 4, sandwich=True),
    }.items():
        scores[name] = Elastic(ground, space, settings).measure(drawn, 0)
    for name, scored in scores.items():
        add_row(ELASTIC, {
            **case.key(), "trained": name, "vectors": len(drawn), "cost": round(sum(trial.cost for trial in scored), 3),
            "spearman": round(agreement(scored, real), 3), "spread_real_nats": spread_of(real), "spread_scored_nats": spread_of(scored),
        })  # fmt: skip


def spread_of(trials: Sequence[RankTrial]) -> float:
    return round(statistics.stdev(trial.loss_nats for trial in trials if trial.loss_nats is not None), 5)


def write_tables() -> None:
    rows, models = read_rows(RECOVERED), read_rows(MODELS)
    cases = dict.fromkeys((row["model"], row["ratio"], row["steps"], row["budget"]) for row in rows)
    lines = ["# Ranks by every allocator at one budget", ""]
    for case in cases:
        lines += _case_lines(dict(zip(("model", "ratio", "steps", "budget"), case, strict=True)), rows, models)
    if scores := read_rows(ELASTIC):
        lines += ["## Elastic scores against full recoveries", "", *table(list(scores[0]), [list(row.values()) for row in scores])]
    lines += [
        f"{machine()}; {versions('torch', 'transformers', 'peft', 'optuna', 'regraft')}. Search seed 0, fresh seeds from {FIRST_SEED}.",
        "",
    ]
    write_text(RESULTS / "rank_allocation.md", "\n".join(lines))


def _case_lines(case: Mapping[str, str], rows: Sequence[Mapping[str, str]], models: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the table of one pruned model under one budget."""
    own = [row for row in rows if matches(row, case) and row["loss_nats"]]
    base = {row["seed"]: float(row["loss_nats"]) for row in own if row["method"] == "uniform"}
    about = next(row for row in models if matches(row, {name: case[name] for name in ("model", "ratio")}))
    drawn: list[list[str]] = []
    for method in dict.fromkeys(row["method"] for row in own):
        mine = [row for row in own if row["method"] == method and row["seed"] in base]
        gains = [1e3 * (base[row["seed"]] - float(row["loss_nats"])) for row in mine]
        gain = "" if all(row["ranks"] == row_of(own, "uniform", row["seed"])["ranks"] for row in mine) else _interval(gains)
        share = statistics.fmean(float(row["accuracy"]) for row in mine) / float(about["dense_accuracy"])
        search = next((row for row in read_rows(SEARCHED) if matches(row, {**case, "method": method})), None)
        costs = [f"{search['cost']} + {search['confirming_cost']}", search["minutes"], search["peak_mb"]] if search else ["", "", ""]
        loss = statistics.fmean(float(row["loss_nats"]) for row in mine)
        drawn.append([method, mine[0]["ranks"], mine[0]["parameters"], str(len(mine)), f"{loss:.4f}", gain, f"{share:.1%}", *costs])
    head = ["allocator", "ranks", "parameters", "seeds", "test loss", "gain over uniform, 10⁻³ nats (95 %)", "accuracy / dense",
            "search + confirmation, recoveries", "minutes", "peak MB"]  # fmt: skip
    title = f"## {case['model']}, {float(case['ratio']):.0%} pruned, budget {case['budget']}, {case['steps']} steps"
    says = (
        f"Shares pruned by layer: {about['shares_pruned']}. Test loss dense {about['dense_loss']}, pruned {about['pruned_loss']}; accuracy dense "
        f"{about['dense_accuracy']}, pruned {about['pruned_accuracy']}."
    )
    return [title, "", says, "", *table(head, drawn), *_beside_the_best(own)]


def _beside_the_best(own: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns a line about rankadaptor and the best of the others, seed by seed."""
    losses: dict[str, dict[str, float]] = {}
    for row in own:
        losses.setdefault(row["method"], {})[row["seed"]] = float(row["loss_nats"])
    ours = losses.pop("rankadaptor", {})
    apart = {name for name in losses if name.endswith("as found")} | {UNTRAINED}
    others = {name: found for name, found in losses.items() if name not in apart and ours.keys() <= found.keys()}
    if not ours or not others:
        return []
    best = min(others, key=lambda name: statistics.fmean(others[name].values()))
    gain = _interval([1e3 * (others[best][seed] - loss) for seed, loss in ours.items()])
    return [f"rankadaptor beside the best of the others, {best}: a gain of {gain} · 10⁻³ nats.", ""]


def _interval(values: Sequence[float]) -> str:
    """Returns mean and 95 % interval; the mean alone of one value."""
    return "{:+.2f} ± {:.2f}".format(*interval(values)) if len(values) > 1 else f"{values[0]:+.2f}"


def row_of(rows: Sequence[Mapping[str, str]], method: str, seed: str) -> Mapping[str, str]:
    return next(row for row in rows if row["method"] == method and row["seed"] == seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="seedling")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--ratios", default="0.2,0.3,0.5")
    parser.add_argument("--budgets", default="r=8", help=f"of {', '.join(CHOICES)}")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=100, help="of a full recovery")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rank_allocation", help="pruned models and searches")
    parser.add_argument("--elastic", type=int, default=0, help="instead: compare elastic scores with so many recoveries")
    parser.add_argument("--tables", action="store_true", help="only draw the tables")
    arguments = parser.parse_args()
    if arguments.tables:
        write_tables()
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    for ratio in map(float, arguments.ratios.split(",")):
        bench = Bench(arguments.model, arguments.text, ratio, arguments.steps, arguments.work)
        for budget in arguments.budgets.split(","):
            case = Case(Path(arguments.model).name, ratio, arguments.steps, budget)
            if arguments.elastic:
                elastic(case, bench, arguments.elastic)
            else:
                reference(case, bench, bench.space(budget))
                compare(case, bench, arguments.methods.split(","), arguments.seeds, deadline)
            write_tables()


if __name__ == "__main__":
    main()
