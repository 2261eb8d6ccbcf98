"""Every adapter at one budget of trained parameters, recovering one pruned model, beside PEFT's VeRA, RandLoRA and MiSS.

    python benchmarks/adapters.py MODEL TEXT [--work DIR] [--minutes 5] [--only recovery|cost|targets]

MODEL is pruned once by 20 % of all parameters. Each adapter gets the rank (or number of bases) whose count of trained numbers is nearest to
that of LoRA of rank 2, and trains on the same 30 batches of 4 x 64 tokens with AdamW, a linear fall of the learning rate, no dropout. Its
peak rate is its own default times 1, 3, 9, as long as the loss of a held-out text falls, with a seed of its own; LoRA's kin take LoRA's
multiple. Then it runs with the paired seeds, which decide the batches and the first values. The loss is of other held-out text. PEFT's three
start from 1e-3 (MiSS), 4e-3 (VeRA) and 4e-4 (RandLoRA, which 4e-3 makes diverge).

Step times are medians of the processor time of steps taken in turns, one adapter after the other, in one process with one thread, so that
other work on the machine has little part in them. Peak memory is what a process that is forked for an adapter has at most beyond what it
had before the adapter was put on. The size is of all tensor files that a user keeps beside the base.

Every row is on disk before the next begins (``results/adapters_recovery.csv``): a run stops after ``--minutes`` and the next one goes on with
what is missing. ``python benchmarks/adapters_tables.py`` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import MissConfig, PeftConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from common import RESULTS, add_row, read_rows
from regraft.adapters import AdapterRequest, Evidence, ParameterGroup, make_specs
from regraft.adapters.deep_lora import first_frames
from regraft.adapters.nola import Nola, NolaOptions
from regraft.adapters.seeding import isolated
from regraft.data.text import Corpus, read_corpus
from regraft.models.load import load, require_tokenizer
from regraft.pipelines.prune.prune import prune
from regraft.settings import PruneSettings, RecoverSettings
from regraft.surgery.adapters import finish, inject, save_adapter
from regraft.surgery.targets import find_targets
from regraft.training.batches import collate, make_examples, padding_token, spread
from regraft.training.losses import mean_loss
from regraft.training.optimizer import make_optimizer, parameter_groups

BATCH, TOKENS, STEPS, RATIO = 4, 64, 30, 0.2
SEEDS, TUNING_SEED = (0, 1, 2), 100
RATES = (1.0, 3.0, 9.0)  # times the default, tried as long as the loss falls
RECOVERY, COST, TARGETS = (RESULTS / f"adapters_{name}.csv" for name in ("recovery", "cost", "targets"))
WIDE = 4096
SHARES = {"train": (0.0, 0.85), "choice": (0.85, 0.9), "test": (0.9, 1.0)}
CPU = torch.device("cpu")

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Put:
    """An adapter on a model: what is trained, how, and how it is written."""

    module: nn.Module
    groups: list[ParameterGroup]
    save: Callable[[Path], None]
    after: Callable[[int], None]
    finish: Callable[[], None]

    @property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Contestant:
    """One adapter: its size is what the budget decides. LoRA's kin are not tuned: they train at LoRA's multiple."""

    name: str
    put: Callable[[Any, int, float, int, Evidence], Put]
    sizes: Sequence[int]
    size_name: str = "rank"
    tuned: bool = True


def ours(adapter: str, *options: str, sized: str = "") -> Callable[[Any, int, float, int, Evidence], Put]:
    """An adapter of the registry; its size is the rank, or the option that is named."""

    def put(model: Any, size: int, factor: float, seed: int, evidence: Evidence) -> Put:
        chosen = (*options, f"{sized}={size}") if sized else options
        rank = 2 if sized else size
        settings = RecoverSettings(adapter=adapter, rank=rank, adapter_options=chosen, dropout=0.0, steps=STEPS)
        injected = inject(model, settings, None, seed, evidence)
        groups = [ParameterGroup(group.parameters, factor * group.lr, group.eps) for group in parameter_groups(injected, settings)]
        return Put(
            injected.module,
            groups,
            lambda folder: save_adapter(injected, folder, "base"),
            lambda step: injected.adapter.after_step(injected.module, step),
            lambda: finish(injected),
        )

    return put


def rival(config: Callable[[int, list[str]], PeftConfig], rate: float) -> Callable[[Any, int, float, int, Evidence], Put]:
    """An adapter of PEFT that regraft does not offer."""

    def put(model: Any, size: int, factor: float, seed: int, evidence: Evidence) -> Put:
        targets = sorted({name.rpartition(".")[2] for name in find_targets(model)})
        with isolated(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config(size, targets))
        assert isinstance(adapted, PeftModel)
        groups = [ParameterGroup(tuple(p for p in adapted.parameters() if p.requires_grad), factor * rate)]
        return Put(adapted, groups, lambda folder: adapted.save_pretrained(str(folder)), lambda step: None, lambda: None)

    return put


def vera(size: int, targets: list[str]) -> PeftConfig:
    return VeraConfig(r=size, target_modules=targets, vera_dropout=0.0, projection_prng_key=1, task_type="CAUSAL_LM")  # pyright: ignore


def randlora(size: int, targets: list[str]) -> PeftConfig:
    return RandLoraConfig(r=size, target_modules=targets, randlora_dropout=0.0, projection_prng_key=1, task_type="CAUSAL_LM")  # pyright: ignore


def miss(size: int, targets: list[str]) -> PeftConfig:
    return MissConfig(r=size, target_modules=targets, miss_dropout=0.0, task_type="CAUSAL_LM")  # pyright: ignore


CONTESTANTS = (
    Contestant("lora", ours("lora"), (2,)),
    Contestant("deep_lora", ours("deep_lora"), (2, 4)),
    Contestant("deep_lora, outer factors fixed", ours("deep_lora", "gamma=0"), (14, 16, 18)),
    Contestant("nola", ours("nola", sized="bases"), (380, 400, 420), "bases"),
    Contestant("lora_xs", ours("lora_xs"), (27, 28, 29, 30)),
    Contestant("block_lora", ours("block_lora"), (2,)),
    Contestant("mora, rotation", ours("mora"), (1, 2, 3)),
    Contestant("mora, sharing", ours("mora", "form=sharing"), (1, 2, 3)),
    Contestant("dora", ours("dora"), (1, 2), tuned=False),
    Contestant("olora", ours("olora"), (2,), tuned=False),
    Contestant("pissa", ours("pissa"), (2,), tuned=False),
    Contestant("eva", ours("eva"), (2,), tuned=False),
    Contestant("adalora", ours("adalora"), (1, 2), tuned=False),
    Contestant("PEFT VeRA", rival(vera, 4e-3), (576, 608, 640)),
    Contestant("PEFT RandLoRA", rival(randlora, 4e-4), (160, 128, 96, 64, 48, 32)),
    Contestant("PEFT MiSS", rival(miss, 1e-3), (3, 4, 5)),
)


class Setting:
    """What all adapters share."""

    def __init__(self, dense: str, folder: Path, parts: dict[str, Corpus]) -> None:
        self.dense, self.folder, self.parts = dense, folder, parts
        loaded = load(str(folder))
        self.pruned, self.tokenizer = loaded.model, require_tokenizer(loaded)
        self.drawn: dict[int, list[Batch]] = {}

    def model(self) -> Any:
        return copy.deepcopy(self.pruned)

    def batches(self, seed: int) -> list[Batch]:
        """The training batches of a seed."""
        if seed not in self.drawn:
            self.drawn[seed] = self._batches(seed)
        return self.drawn[seed]

    def _batches(self, seed: int) -> list[Batch]:
        tokenizer = self.tokenizer
        rows = make_examples(self.parts["train"], tokenizer, TOKENS, wanted=STEPS * BATCH, seed=seed)
        order: list[int] = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = [rows[index] for index in (order * -(-STEPS * BATCH // len(order)))[: STEPS * BATCH]]
        return [collate(drawn[start : start + BATCH], padding_token(tokenizer)) for start in range(0, len(drawn), BATCH)]

    def held_out(self, part: str, windows: int) -> list[Batch]:
        tokenizer = self.tokenizer
        rows = spread(make_examples(self.parts[part], tokenizer, TOKENS, wanted=windows, seed=0), windows)
        return [collate(rows[start : start + 16], padding_token(tokenizer)) for start in range(0, len(rows), 16)]


def prepared(model: str, text: Path, work: Path) -> Setting:
    """Divides the text by documents and prunes the model, once."""
    documents = read_corpus(text, "train").documents
    parts = {
        name: Corpus(f"{text.name} ({name})", "train", documents[int(first * len(documents)) : int(last * len(documents))])
        for name, (first, last) in SHARES.items()
    }
    folder = work / "pruned"
    if not folder.is_dir():
        calibration = work / "calibration.txt"
        work.mkdir(parents=True, exist_ok=True)
        calibration.write_text("<|endoftext|>".join(parts["train"].documents[:200]), encoding="utf-8")
        cuts = PruneSettings(
            ratio=RATIO, calibration=calibration, criterion="taylor", shape="uniform", select="uniform", reconstruct="none"
        )
        prune(model, folder, cuts, seed=0)
    return Setting(model, folder, parts)


def evidence_of(batches: Sequence[Batch]) -> Evidence:
    return Evidence(lambda count: batches[:count])


def chosen_sizes(setting: Setting) -> dict[str, int]:
    """The size of every contestant whose count of trained numbers is nearest to that of LoRA of rank 2."""
    kept = setting.folder.with_name("sizes.json")
    if kept.is_file():
        return json.loads(kept.read_text())
    batches = setting.batches(TUNING_SEED)
    counts: dict[str, dict[int, int]] = {}
    for contestant in CONTESTANTS:
        for size in contestant.sizes:
            put = contestant.put(setting.model(), size, 1.0, 0, evidence_of(batches[:1]))
            counts.setdefault(contestant.name, {})[size] = put.trained
    budget = counts["lora"][2]
    sizes = {name: min(found, key=lambda size: abs(math.log(found[size] / budget))) for name, found in counts.items()}
    kept.write_text(json.dumps(sizes))
    return sizes


def trained(setting: Setting, contestant: Contestant, size: int, factor: float, seed: int) -> Put:
    """Trains one adapter."""
    batches = setting.batches(seed)
    put = contestant.put(setting.model(), size, factor, seed, evidence_of(batches))
    optimizer = make_optimizer(put.groups)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) * (1 - step / STEPS))
    put.module.train()
    for step, batch in enumerate(batches, start=1):
        step_once(put, optimizer, batch)
        put.after(step)
        schedule.step()
    put.finish()
    return put


def step_once(put: Put, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    put.module(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in put.module.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def recover_all(setting: Setting, sizes: dict[str, int], deadline: float) -> None:
    """Chooses every adapter's rate, then runs the paired seeds, all adapters with one seed before the next."""
    rows = read_rows(RECOVERY)
    choice, test = setting.held_out("choice", 32), setting.held_out("test", 96)
    done = {(row["adapter"], float(row["factor"]), int(row["seed"])): row for row in rows}
    for name, source in (("dense", setting.dense), ("pruned", str(setting.folder))):
        if (name, 0.0, 0) not in done:
            model = load(source).model
            add_row(RECOVERY, _row(name, 0, 0.0, 0, 0, mean_loss(model, choice, CPU), mean_loss(model, test, CPU)))
    for contestant, factor, seed in plan(done):
        if time.monotonic() > deadline:
            print("time is up; the next run goes on")
            return
        put = trained(setting, contestant, sizes[contestant.name], factor, seed)
        count = put.trained
        test_nats = mean_loss(put.module, test, CPU) if seed != TUNING_SEED else math.nan
        row = _row(contestant.name, sizes[contestant.name], factor, seed, count, mean_loss(put.module, choice, CPU), test_nats)
        add_row(RECOVERY, row)
        done[(contestant.name, factor, seed)] = {key: str(value) for key, value in row.items()}
        print(row, flush=True)


def _row(
    adapter: str, size: int, factor: float, seed: int, count: int, choice_nats: float = math.nan, test_nats: float = math.nan
) -> dict[str, Any]:
    return {
        "adapter": adapter, "size": size, "factor": factor, "seed": seed, "trained": count,
        "choice_nats": round(choice_nats, 5), "test_nats": round(test_nats, 5),
    }  # fmt: skip


def plan(done: dict[tuple[str, float, int], dict[str, str]]) -> Iterator[tuple[Contestant, float, int]]:
    """Yields what is missing. ``done`` grows while this runs."""
    for contestant in CONTESTANTS:
        for index, factor in enumerate(RATES if contestant.tuned else (best_factor(CONTESTANTS[0], done),)):
            if index >= 2 and _choice(done, contestant, RATES[index - 1]) >= _choice(done, contestant, RATES[index - 2]):
                break
            if (contestant.name, factor, TUNING_SEED) not in done:
                yield contestant, factor, TUNING_SEED
    for seed in SEEDS:
        for contestant in CONTESTANTS:
            best = best_factor(contestant, done)
            if (contestant.name, best, seed) not in done:
                yield contestant, best, seed


def best_factor(contestant: Contestant, done: dict[tuple[str, float, int], dict[str, str]]) -> float:
    """The multiple of the default rate with the lowest loss on the text that chooses."""
    tried = [factor for factor in RATES if (contestant.name, factor, TUNING_SEED) in done]
    return min(tried, key=lambda factor: _choice(done, contestant, factor))


def _choice(done: dict[tuple[str, float, int], dict[str, str]], contestant: Contestant, factor: float) -> float:
    return float(done[(contestant.name, factor, TUNING_SEED)]["choice_nats"])


def costs(setting: Setting, sizes: dict[str, int], turns: int = 3) -> None:
    """Writes file size, step time and peak memory of every adapter."""
    batches = setting.batches(0)
    memory = {contestant.name: _forked(_peak_bytes, setting, contestant, sizes[contestant.name], batches) for contestant in CONTESTANTS}
    puts = {c.name: c.put(setting.model(), sizes[c.name], 1.0, 0, evidence_of(batches)) for c in CONTESTANTS}
    optimizers = {name: make_optimizer(put.groups) for name, put in puts.items()}
    taken: dict[str, list[float]] = {name: [] for name in puts}
    for turn in range(turns + 1):
        for name in sorted(puts, reverse=bool(turn % 2)):
            for batch in batches[:2]:
                start = time.process_time()
                step_once(puts[name], optimizers[name], batch)
                if turn:
                    taken[name].append(time.process_time() - start)
    COST.unlink(missing_ok=True)
    for contestant in CONTESTANTS:
        put = puts[contestant.name]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            put.save(Path(folder))
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        add_row(
            COST,
            {
                "adapter": contestant.name, "size_name": contestant.size_name, "size": sizes[contestant.name], "trained": put.trained,
                "file_bytes": size, "step_seconds": round(statistics.median(taken[contestant.name]), 4),
                "peak_bytes": memory[contestant.name],
            },
        )  # fmt: skip


def targets(setting: Setting, turns: int = 12) -> None:
    """Writes what the adapters were built to: a basis in time, a step in time, random matrices in little memory."""
    TARGETS.unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(WIDE, 16, generator=generator) @ torch.randn(16, WIDE, generator=generator) / 4
    gradient = planted + torch.randn(WIDE, WIDE, generator=generator)
    torch.set_num_threads(2)
    spent: list[tuple[float, float]] = []
    for _ in range(4):
        start = time.perf_counter(), time.process_time()
        first_frames(gradient, 8, torch.Generator().manual_seed(0))
        spent.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    torch.set_num_threads(1)
    add_row(TARGETS, {"what": "basis_wall_seconds", "value": round(min(wall for wall, _ in spent[1:]), 3)})
    add_row(TARGETS, {"what": "basis_processor_seconds", "value": round(statistics.median(cpu for _, cpu in spent[1:]), 3)})
    batches = setting.batches(0)
    puts = {name: ours(name)(setting.model(), 8, 1.0, 0, evidence_of(batches)) for name in ("lora", "deep_lora")}
    optimizers = {name: make_optimizer(put.groups) for name, put in puts.items()}
    ratios: list[float] = []
    for turn in range(turns + 2):
        took: dict[str, float] = {}
        for name in sorted(puts, reverse=bool(turn % 2)):
            start_seconds = time.process_time()
            for batch in batches[:2]:
                step_once(puts[name], optimizers[name], batch)
            took[name] = time.process_time() - start_seconds
        ratios += [took["deep_lora"] / took["lora"]] if turn >= 2 else []
    add_row(TARGETS, {"what": "deep_lora_step_over_lora", "value": round(statistics.median(ratios), 3)})
    peaks = {name: _forked(_wide_peak_bytes, name) for name in ("lora", "nola")}
    add_row(TARGETS, {"what": "nola_bytes_above_lora", "value": peaks["nola"] - peaks["lora"]})


def _wide_peak_bytes(name: str) -> int:
    """Memory of a step on one wide layer of 16-row batches, rank 16; of NOLA with 512 bases, which would take 128 MiB a layer kept."""
    options = NolaOptions(bases=512)
    request = AdapterRequest({"w": 16}, {"w": 16.0}, 0.0, 1, options)
    base = nn.Linear(WIDE, WIDE)
    inputs = torch.randn(16, WIDE, generator=torch.Generator().manual_seed(0))
    before = status_bytes("VmRSS")
    if name == "nola":
        delta: nn.Module = Nola().make(make_specs({"w": base}, request)["w"], base.weight.detach())
    else:
        delta = nn.Sequential(nn.Linear(WIDE, 16, bias=False), nn.Linear(16, WIDE, bias=False))
    delta(inputs).square().sum().backward()
    return status_bytes("VmHWM") - before


def _peak_bytes(setting: Setting, contestant: Contestant, size: int, batches: list[Batch]) -> int:
    model = setting.model()
    before = status_bytes("VmRSS")
    put = contestant.put(model, size, 1.0, 0, evidence_of(batches))
    optimizer = make_optimizer(put.groups)
    for batch in batches[:2]:
        step_once(put, optimizer, batch)
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A line of this process's memory: VmRSS, what it holds now, or VmHWM, the most it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _forked(function: Callable[..., int], *arguments: Any) -> int:
    """Calls a function in a forked process, whose peak of memory is its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def call() -> None:
        torch.set_num_threads(1)
        sender.send(function(*arguments))

    process = context.Process(target=call)
    process.start()
    result = receiver.recv()
    process.join()
    return int(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-adapters"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", choices=("recovery", "cost", "targets"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    setting = prepared(arguments.model, arguments.text, arguments.work)
    sizes = chosen_sizes(setting)
    print(sizes, flush=True)
    if arguments.only in (None, "cost"):
        costs(setting, sizes)
    if arguments.only in (None, "targets"):
        targets(setting)
    if arguments.only in (None, "recovery"):
        recover_all(setting, sizes, deadline)


if __name__ == "__main__":
    main()
