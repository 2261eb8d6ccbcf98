"""What distillation and re-fitting win back at equal tokens, and how fast training is beside plain PEFT.

    python benchmarks/recovery.py MODEL TEXT [--work DIR] [--minutes 9] [--only throughput|recovery|tables]

MODEL is pruned by several recipes at one share of all parameters; each result is recovered with LoRA of rank 8 on --steps batches of
8 x 128 tokens, with and without its dense model as a teacher, with several learning rates and seeds. TEXT (documents separated by
``<|endoftext|>``) is divided by documents: calibration, training, the choice of the best checkpoint, and the test text, which nothing
else has seen. What is reported is the gap: loss on the test text over that of the dense model, in nats a token. Seeds decide the order of
the data, the first values of the adapter and dropout; recipes with the same seed see the same batches, so that differences are paired.

Throughput compares the optimizer steps of ``regraft.training`` with those of PEFT's LoRA under a plain Trainer at the same ranks and on
the same rows, in turns, each turn a few steps; medians over all steps.

Every row is on disk before the next begins (``benchmarks/results/recovery_MODEL.csv``): a run stops after ``--minutes`` and the next one goes
on with what is missing.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from common import interval, table
from regraft.data.text import Corpus, read_corpus
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.ranks.allocate import allocate_ranks
from regraft.settings import AllocateSettings, PruneSettings, RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training.batches import Ordered, collate, make_examples, padding_token, spread
from regraft.training.callbacks import Keeper, Pace
from regraft.training.distill import Teacher
from regraft.training.job import prepare
from regraft.training.losses import mean_loss
from regraft.training.optimizer import parameter_groups
from regraft.training.recover import recover
from regraft.training.trainer import RecoveryTrainer

RESULTS = Path(__file__).parent / "results"
BATCH, TOKENS, RANK, RATIO = 8, 128, 8, 0.2
SHARES = {"calibration": (0.0, 0.15), "train": (0.15, 0.85), "choice": (0.85, 0.9), "test": (0.9, 1.0)}
TEST_WINDOWS = 128
CPU = torch.device("cpu")

PRUNED: dict[str, dict[str, Any]] = {
    "taylor": {"criterion": "taylor", "shape": "uniform", "select": "uniform", "reconstruct": "none"},
    "taylor+ls": {"criterion": "taylor", "shape": "uniform", "select": "uniform", "reconstruct": "least_squares"},
    "default": {},
}


Recipe = tuple[str, float, float]
"""How it is pruned, the share of distillation in the loss, and its temperature."""
ORIGINAL: Recipe = ("taylor", 0.0, 1.0)
OURS: Recipe = ("default", 0.5, 1.0)
RATES = {ORIGINAL: (1e-3, 3e-3, 1e-2), OURS: (1e-3, 3e-3, 6e-3)}
RANKED = "default, ranks by share pruned"
PARTS: tuple[Recipe, ...] = (
    (RANKED, 0.5, 1.0), ("default", 1.0, 1.0), ("default", 0.0, 1.0), ("default", 0.5, 2.0), ("taylor", 0.5, 1.0), ("taylor+ls", 0.0, 1.0), ("taylor+ls", 0.5, 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One recovery."""

    pruned: str
    distill: float
    temperature: float
    lr: float
    seed: int
    steps: int
    dense_nats: float
    pruned_nats: float
    recovered_nats: float
    best_step: int
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.recipe, self.lr, self.seed, self.steps)

    @property
    def recipe(self) -> Recipe:
        return (self.pruned, self.distill, self.temperature)


def next_wanted(rows: Sequence[Row], seeds: int, steps: int) -> Row | None:
    """Returns what to run next, its figures empty: the recipes at every rate, then at their best rates on more seeds, then the parts."""
    done = {row.key for row in rows}
    plan: list[tuple[str, float, float, float, int]] = [(*recipe, lr, 0) for recipe, tried in RATES.items() for lr in tried]
    best = {recipe: rate for recipe in RATES if (rate := best_rate(rows, recipe, steps)) is not None}
    if len(best) == len(RATES):
        plan += [(*recipe, rate, seed) for seed in range(1, seeds) for recipe, rate in best.items()]
        plan += [(*part, best[OURS if part[0] in (OURS[0], RANKED) else ORIGINAL], 0) for part in PARTS]
    missing = (each for each in plan if (*each, steps) not in done)
    return next((Row(*each, steps, math.nan, math.nan, math.nan, 0, 0.0) for each in missing), None)


def best_rate(rows: Sequence[Row], recipe: Recipe, steps: int) -> float | None:
    """Returns the rate that is best on the seed that all rates were tried with; None before all were."""
    tried = {row.lr: row.recovered_nats for row in rows if row.seed == 0 and row.steps == steps and row.recipe == recipe}
    return min(tried, key=tried.__getitem__) if set(RATES[recipe]) <= tried.keys() else None


def read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    kinds = {"pruned": str, "seed": int, "steps": int, "best_step": int}
    with path.open(encoding="utf-8", newline="") as stream:
        return [Row(**{name: kinds.get(name, float)(value) for name, value in row.items()}) for row in csv.DictReader(stream)]


def write_rows(rows: Iterable[Any], kind: type[Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    partial.replace(path)


def divided(text: Path) -> dict[str, Corpus]:
    """Divides a text by documents, in their order."""
    documents = read_corpus(text, "train").documents
    parts = {name: (int(first * len(documents)), int(last * len(documents))) for name, (first, last) in SHARES.items()}
    return {name: Corpus(f"{text.name} ({name})", "train", documents[first:last]) for name, (first, last) in parts.items()}


def pruned_folder(name: str, model: str, calibration: Corpus, work: Path) -> Path:
    """Prunes once for each recipe; runs that come later find the folder."""
    folder = work / f"pruned-{name}"
    if not folder.is_dir():
        text = work / "calibration.txt"
        text.write_text("<|endoftext|>".join(calibration.documents), encoding="utf-8")
        prune(model, folder, PruneSettings(ratio=RATIO, calibration=text, seq_len=TOKENS, **PRUNED[name]), seed=0)
    return folder


def ranks_for(folder: Path, work: Path) -> Path:
    """Allocates ranks proportional to the shares pruned, at the cost of rank 8 everywhere; runs that come later find the plan."""
    plan = work / "ranks.json"
    if not plan.is_file():
        allocate_ranks(folder, plan, AllocateSettings(method="proportional", budget=f"r={RANK}"), seed=0)
    return plan


def test_loss(loaded: Loaded, test: Corpus) -> float:
    tokenizer = require_tokenizer(loaded)
    rows = spread(make_examples(test, tokenizer, TOKENS, wanted=TEST_WINDOWS, seed=0), TEST_WINDOWS)
    batches = [collate(rows[start : start + 16], padding_token(tokenizer)) for start in range(0, len(rows), 16)]
    return mean_loss(loaded.model, batches, CPU)


def recover_all(model: str, corpora: dict[str, Corpus], work: Path, seeds: int, steps: int, deadline: float, path: Path) -> None:
    rows = read_rows(path)
    dense = load(model)
    dense_nats = rows[0].dense_nats if rows else test_loss(dense, corpora["test"])
    while (row := next_wanted(rows, seeds, steps)) is not None:
        if time.monotonic() > deadline:
            print("time is up; the next run goes on")
            return
        folder = pruned_folder("default" if row.pruned == RANKED else row.pruned, model, corpora["calibration"], work)
        loaded = load(folder)
        known = next((other.pruned_nats for other in rows if other.pruned == folder.name.removeprefix("pruned-")), None)
        before = known if known is not None else test_loss(loaded, corpora["test"])
        settings = RecoverSettings(
            rank=RANK, lr=row.lr, steps=steps, batch=BATCH, seq_len=TOKENS, eval_every=max(1, steps // 3), held_out_windows=16,
            distill=row.distill, temperature=row.temperature, quiet=True, ranks=ranks_for(folder, work) if row.pruned == RANKED else None,
        )  # fmt: skip
        teacher = Teacher(dense.model, model, dense.tokenizer, dense.fingerprint) if row.distill else None
        # Kept beside the results, so that a slice that ends in the middle of a recovery is gone on with by the next.
        unfinished = work / "-".join(map(str, row.key))
        texts = (corpora["train"], corpora["choice"])
        done = recover(
            loaded.model, require_tokenizer(loaded), *texts, settings, seed=row.seed, work=unfinished, resume=True, teacher=teacher
        )
        figures = {"dense_nats": dense_nats, "pruned_nats": before, "recovered_nats": test_loss(loaded, corpora["test"])}
        rows.append(replace(row, **figures, best_step=done.best_step, seconds=done.seconds))
        write_rows(rows, Row, path)
        shutil.rmtree(unfinished)
        print(rows[-1], flush=True)


@dataclass(frozen=True)
class Speed:
    """Median time of an optimizer step: by the clock on the wall, and of the processor, which other work on the machine does not lengthen."""

    what: str
    seconds: float
    cpu_seconds: float


class Clock(TrainerCallback):
    """Notes when each optimizer step ends."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def durations(self) -> list[tuple[float, float]]:
        """Returns wall and processor seconds of all steps but the first two, which warm up."""
        return [(after[0] - before[0], after[1] - before[1]) for before, after in zip(self.ends[1:-1], self.ends[2:], strict=True)]


def throughput(model: str, corpus: Corpus, turns: int, steps: int) -> list[Speed]:
    """Times steps of ours and of plain PEFT, in turns."""
    settings = RecoverSettings(rank=RANK, lr=1e-3, steps=steps, batch=BATCH, seq_len=TOKENS, eval_every=10**6, dropout=0.05, quiet=True)
    ways = {"PEFT and the Trainer": plain_steps, "regraft": our_steps}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in sorted(ways, reverse=bool(turn % 2)):
            found[name] += ways[name](model, corpus, settings)
    return [Speed(name, *(statistics.median(column) for column in zip(*taken, strict=True))) for name, taken in found.items()]


def plain_steps(model: str, corpus: Corpus, settings: RecoverSettings) -> list[tuple[float, float]]:
    loaded, clock = load(model), Clock()
    rows = Ordered(make_examples(corpus, require_tokenizer(loaded), TOKENS, wanted=settings.steps * BATCH, seed=0), settings, 0, "text")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        loaded.model, LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=settings.steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        data = [{"input_ids": row.input_ids, "labels": row.labels} for row in (rows[index] for index in range(len(rows)))]
        Trainer(model=adapted, args=arguments, train_dataset=data, callbacks=[clock]).train()  # pyright: ignore[reportArgumentType]
    return clock.durations()


def our_steps(model: str, corpus: Corpus, settings: RecoverSettings) -> list[tuple[float, float]]:
    loaded, clock = load(model), Clock()
    tokenizer = require_tokenizer(loaded)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        few = settings.model_copy(update={"held_out_windows": 8})
        job = prepare(loaded.model, tokenizer, corpus, corpus, few, seed=0, work=work)
        injected = inject(loaded.model, settings, None, 0)
        keeper = Keeper(work, injected, job.identity, None)
        trainer = RecoveryTrainer(job, injected, parameter_groups(injected, settings), (Pace(settings.eval_every, 0), keeper, clock))
        trainer.train()
    return clock.durations()


def with_interval(values: Sequence[float]) -> str:
    """Returns mean and half of a 95 % interval by Student's t, the mean alone where there is one value."""
    mean, half = interval(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {half:.3f}"


def tables(rows: Sequence[Row], speeds: Sequence[Speed], model: str) -> str:
    """Returns the tables in Markdown."""
    machine = f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    name = Path(model).name
    lines = [f"# Recovery of {name} after {RATIO:.0%} of its parameters", "", f"{machine}, PEFT {version('peft')}.", ""]
    if rows:
        dense = rows[0].dense_nats
        setting = f"LoRA of rank {RANK}, batches of {BATCH} x {TOKENS} tokens"
        lines += [f"{setting}. Dense: {dense:.4f} nats a token. Gaps to it, in nats a token, on text that nothing else has seen.", ""]
        body: list[list[str]] = []
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.steps, *row.key[:4]), []).append(row)
        for (steps, pruned, share, temperature, lr), members in sorted(groups.items()):
            gaps = [row.recovered_nats - dense for row in members]
            before = members[0].pruned_nats - dense
            body.append(
                [pruned, str(steps), f"{share:g}", f"{temperature:g}", f"{lr:g}", f"{before:.3f}", with_interval(gaps), str(len(gaps))]
            )
        lines += table(["pruned", "steps", "distillation", "T", "lr", "pruned gap", "recovered gap", "seeds"], body)
        lines += _ratio_lines(rows, dense)
    if speeds:
        base = next(speed.cpu_seconds for speed in speeds if speed.what.startswith("PEFT"))
        timed = (
            [
                one.what,
                f"{one.seconds:.4f}",
                f"{BATCH * TOKENS / one.seconds:,.0f}",
                f"{one.cpu_seconds:.4f}",
                f"{base / one.cpu_seconds:.3f}",
            ]
            for one in speeds
        )
        lines += ["", *table(["steps of", "median s", "tokens/s", "median CPU s", "speed by CPU time beside plain PEFT"], timed)]
    return "\n".join(lines) + "\n"


def _ratio_lines(rows: Sequence[Row], dense: float) -> list[str]:
    """Compares ours at its best rate with the original at its best, seed by seed, for each number of steps."""
    lines: list[str] = []
    for steps in sorted({row.steps for row in rows}):
        gaps: list[dict[int, float]] = []
        for recipe in (OURS, ORIGINAL):
            rate = best_rate(rows, recipe, steps)
            mine = [row for row in rows if row.steps == steps and row.recipe == recipe and row.lr == rate]
            gaps.append({row.seed: row.recovered_nats - dense for row in mine})
        seeds = sorted(gaps[0].keys() & gaps[1].keys())
        if seeds:
            ratio = with_interval([gaps[0][seed] / gaps[1][seed] for seed in seeds])
            lines.append(
                f"{steps} steps: gap of ours over that of the original, each at its best rate, seed by seed: {ratio} ({len(seeds)} seeds)."
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-recovery"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("recovery", "throughput", "tables"))
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    given.work.mkdir(parents=True, exist_ok=True)
    corpora = divided(given.text)
    name = Path(given.model).name
    rows, speeds = RESULTS / f"recovery_{name}.csv", RESULTS / f"recovery_{name}_throughput.csv"
    if given.only in (None, "throughput"):
        write_rows(throughput(given.model, corpora["train"], turns=4, steps=8), Speed, speeds)
    if given.only in (None, "recovery"):
        recover_all(given.model, corpora, given.work, given.seeds, given.steps, deadline, rows)
    measured: list[Speed] = []
    if speeds.is_file():
        with speeds.open(encoding="utf-8", newline="") as stream:
            measured = [Speed(row["what"], float(row["seconds"]), float(row["cpu_seconds"])) for row in csv.DictReader(stream)]
    text = tables(read_rows(rows), measured, given.model)
    (RESULTS / f"recovery_{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
