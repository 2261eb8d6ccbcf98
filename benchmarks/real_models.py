"""A real model pruned by regraft at each effort and calibration, by LLM-Pruner's recipe, and by other packages: losses in several domains.

    python benchmarks/real_models.py --model DIR --domains wiki=CAL.txt:HELD.txt,code=CAL.txt:HELD.txt,... [--own wiki] [--ratio 0.2,0.3]
        [--seeds 3] [--only TEXT;...] [--samples 32] [--windows 16]

Each domain has a text to calibrate on and a held-out one that nothing is fitted to; ``--own`` names the one that a user with a single text
would give. Losses are nats per token over the dense model's on the same held-out windows, each domain, their mean and the worst. Beside
them stand the share of repeated runs of four tokens in greedy continuations of held-out text (the dense model's is the first row), processor
seconds, and peak memory. Every row runs in a process of its own and is appended to ``results/real_models.csv``; an interrupted run goes on.
``--prices`` sets the damage that one pass predicts beside the measured one instead, at every size of some layers. ``--growth`` prunes random
models of one width and 6, 12, 24 and 48 layers at two efforts, and needs no model.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import regraft
import rivals
from common import RESULTS, add_row, interval, machine, read_rows, table, versions
from regraft.data.calibration import Source, counts_of, mixed
from regraft.data.own_text import repeated_share
from regraft.data.text import read_corpus
from regraft.data.tokens import calibration_windows
from regraft.groups.discover import discover
from regraft.importance import Evidence, score
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.view import ModelView
from regraft.pipelines.prune.prune import cut_to_plan, plan_pruning
from regraft.pipelines.prune.resolved import resolve
from regraft.settings import LoadSettings, PruneSettings
from regraft.surgery.damage_curves import measure_curves, predict_curves

TOKENS, HELD_SEED, PROMPTS, PROMPT_TOKENS, WRITTEN = 128, 7, 8, 32, 48
PER_LAYER: dict[str, Any] = {"shape": "per-layer"}
RECIPE: dict[str, Any] = {"criterion": "taylor", "select": "uniform", "reconstruct": "none"}
FILE = RESULTS / "real_models.csv"
GROWTH, GROWN_WINDOWS = RESULTS / "real_models_growth.csv", 32


@dataclass(frozen=True)
class Domain:
    """A kind of text: what may be calibrated on, and what is only measured on."""

    name: str
    calibration: Path
    held_out: Path


def domains_in(text: str) -> tuple[Domain, ...]:
    parts = (part.partition("=") for part in text.split(","))
    return tuple(Domain(name, *(Path(file) for file in files.split(":"))) for name, _, files in parts)


def calibrations(domains: tuple[Domain, ...], own: Domain) -> dict[str, str]:
    """What is calibrated on, by name."""
    everything = [str(domain.calibration) for domain in domains]
    return {
        f"{own.name} alone": str(own.calibration),
        f"{own.name} and own text": f"{own.calibration}=0.5,self=0.5",
        "own text": "self",
        "all domains": ",".join(everything),
        "all domains and own text": ",".join([*everything, "self"]),
    }


def rows_of(domains: tuple[Domain, ...], own: Domain) -> Iterator[tuple[str, str, Mapping[str, Any] | tuple[str, str]]]:
    """Yields method, calibration, and settings of ours or the key of a rival."""
    yield "dense", "none", {}
    for effort in ("quick", "default", "thorough"):
        for name in calibrations(domains, own):
            for shape in ("per-layer", "uniform"):
                yield f"{effort}, {shape}", name, {"effort": effort, "shape": shape}
    for name in (f"{own.name} alone", "all domains"):
        yield "LLM-Pruner's recipe", name, RECIPE
    for package, setting in rivals.RIVALS:
        for name in (f"{own.name} alone", "all domains"):
            yield f"{package}: {setting}", name, (package, setting)


@torch.no_grad()
def token_losses(model: PreTrainedModel, windows_NT: Tensor) -> float:
    total = 0.0
    for ids in windows_NT.split(8):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (windows_NT.shape[0] * (windows_NT.shape[1] - 1))


@torch.no_grad()
def written(model: PreTrainedModel, windows_NT: Tensor) -> float:
    """Share of repeated runs of four tokens in greedy continuations."""
    ids, step, cache = windows_NT[:, :PROMPT_TOKENS], windows_NT[:, :PROMPT_TOKENS], None
    for _ in range(WRITTEN):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, step], dim=1)
    return repeated_share(ids)


def one_row(asked: argparse.Namespace) -> None:
    """Measures a single row and appends it."""
    domains = domains_in(asked.domains)
    own = next(domain for domain in domains if domain.name == asked.own)
    method, calibration, ratio, seed = asked.row.split("|")
    how = next(how for name, on, how in rows_of(domains, own) if (name, on) == (method, calibration))
    loaded = load(str(asked.model), LoadSettings(dtype="float32"))
    before = time.process_time()
    texts = calibrations(domains, own)
    model, removed = pruned(loaded, how, texts.get(calibration), float(ratio), int(seed), asked.samples)
    if model is None:
        print(f"{asked.row}: cannot remove so much", flush=True)
        return
    seconds = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    tokenizer = require_tokenizer(loaded)
    held = {
        domain.name: calibration_windows(read_corpus(domain.held_out, "validation"), tokenizer, asked.windows, TOKENS, HELD_SEED)
        for domain in domains
    }
    losses = {name: token_losses(model, windows) for name, windows in held.items()}
    row: dict[str, Any] = {
        "model": asked.model.name,
        "method": method,
        "calibration": calibration,
        "ratio": ratio,
        "seed": seed,
        "held": asked.windows,
    }
    row |= {"windows": asked.samples or "by effort", "removed": f"{removed:.4f}"}
    row |= {f"{name} nats": f"{value:.5f}" for name, value in losses.items()}
    prompts = torch.cat([windows[: PROMPTS // len(held)] for windows in held.values()])
    row |= {"repeated": f"{written(model, prompts):.4f}", "processor seconds": f"{seconds:.0f}", "peak GB": f"{peak:.2f}"}
    add_row(FILE, row)


def pruned(
    loaded: Loaded, how: Mapping[str, Any] | tuple[str, str], calibration: str | None, ratio: float, seed: int, samples: int | None
) -> tuple[PreTrainedModel | None, float]:
    """Returns the pruned model and the share of the parameters that went."""
    if calibration is None:
        return loaded.model, 0.0
    if isinstance(how, tuple):
        windows = drawn_alike(loaded, calibration.split(","), samples or 128, seed)
        found = rivals.RIVALS[how](loaded.model, rivals.Evidence(windows), ratio)
        before, after = (sum(weight.numel() for weight in model.parameters()) if model else 0 for model in (loaded.model, found))
        return found, 1.0 - after / before
    given: dict[str, Any] = {"samples": samples} if samples else {}
    settings = PruneSettings.model_validate({"ratio": ratio, "calibration": calibration, **given, **how})
    result = regraft.prune(loaded, settings=settings, seed=seed, say=lambda line: print(line, flush=True))
    return result.model, result.plan.achieved


def drawn_alike(loaded: Loaded, files: list[str], samples: int, seed: int) -> Tensor:
    """Returns windows of the files in equal parts, int64 (windows, tokens): other packages take windows, and no sources."""
    corpora = [read_corpus(Path(file), "validation") for file in files]
    counts = counts_of(tuple(Source(file, 1.0 / len(files)) for file in files), samples)
    tokenizer = require_tokenizer(loaded)
    parts = [calibration_windows(corpus, tokenizer, count, TOKENS, seed) for corpus, count in zip(corpora, counts, strict=True)]
    return mixed(files, parts, seed).tokens_NT


def prices(asked: argparse.Namespace) -> None:
    """Prints the rank correlation of predicted with measured damage: over the sizes of each group, and over groups at half of their units."""
    domains = domains_in(asked.domains)
    loaded = load(str(asked.model), LoadSettings(dtype="float32"))
    own = next(domain for domain in domains if domain.name == asked.own)
    corpus = read_corpus(own.calibration, "validation")
    windows = calibration_windows(corpus, require_tokenizer(loaded), asked.samples or 32, TOKENS, 0)
    view = ModelView(loaded.model)
    groups = discover(view, ("heads", "ffn"))
    layers = {0, len(view.layers) // 4, len(view.layers) // 2, 3 * len(view.layers) // 4, len(view.layers) - 1}
    names = [group.name for group in groups.groups if group.layer in layers]
    scores = score("surgeon_nats", Evidence(loaded.model, groups, windows, 0))
    measured = measure_curves(view, groups, scores, windows, only=names).values
    predicted = predict_curves(view, groups, scores, windows, only=names).values
    rows: list[dict[str, Any]] = []
    for name, curve in measured.items():
        promised = dict(zip(predicted[name].kept, predicted[name].damage_nats, strict=True))
        pairs = [(promised[size], damage) for size, damage in zip(curve.kept, curve.damage_nats, strict=True) if size in promised]
        middle = pairs[len(pairs) // 2 - 1] if len(pairs) > 2 else pairs[0]
        rank = _rank([pair[0] for pair in pairs], [pair[1] for pair in pairs]) if len(pairs) > 2 else float("nan")
        rows.append({"model": asked.model.name, "group": name, "rank correlation": f"{rank:.3f}"})
        rows[-1] |= {"predicted near half": f"{middle[0]:.6f}", "measured near half": f"{middle[1]:.6f}"}
    for row in rows:
        add_row(RESULTS / "real_models_prices.csv", row)
    for kind in ("heads", "ffn"):
        here = [row for row in rows if row["group"].endswith(kind)]
        over = _rank([float(row["predicted near half"]) for row in here], [float(row["measured near half"]) for row in here])
        print(f"{kind}: over groups {over:.3f}; within groups {[row['rank correlation'] for row in here]}", flush=True)


def growth() -> None:
    """Writes processor seconds of planning and cutting against the number of layers, and the exponent of the fitted power."""
    windows = torch.randint(3, 500, (GROWN_WINDOWS, 64), generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for effort in ("quick", "default"):
        for layers in (6, 12, 24, 48):
            torch.manual_seed(0)  # transformers draws the weights from the global generator
            sizes: dict[str, Any] = {
                "hidden_size": 64,
                "intermediate_size": 176,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 512,
            }
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, **sizes)).eval()
            groups = discover(model, ("heads", "ffn"))
            settings = PruneSettings(effort=effort, ratio=0.2, shape="per-layer", samples=GROWN_WINDOWS)
            resolved = resolve(settings, ModelView(model))
            before = time.process_time()
            cut_to_plan(model, groups, plan_pruning(model, groups, resolved, windows), resolved, windows)
            rows.append({"effort": effort, "layers": layers, "processor seconds": f"{time.process_time() - before:.2f}"})
            add_row(GROWTH, rows[-1])
            print(rows[-1], flush=True)


def _growth_lines() -> list[str]:
    rows = read_rows(GROWTH)
    if not rows:
        return []
    body: list[list[str]] = []
    for effort in dict.fromkeys(row["effort"] for row in rows):
        here = [(int(row["layers"]), float(row["processor seconds"])) for row in rows if row["effort"] == effort]
        slope = np.polyfit(np.log([layers for layers, _ in here]), np.log([seconds for _, seconds in here]), 1)[0]
        body.append([effort, *(f"{seconds:.1f}" for _, seconds in here), f"{slope:.2f}"])
    head = ["effort", *dict.fromkeys(f"{row['layers']} layers" for row in rows), "exponent"]
    text = f"Llamas of random weights, width 64, {GROWN_WINDOWS} windows of 64 tokens, 20 % per layer; processor seconds of one thread."
    return ["## Growth with the number of layers", "", text, "", *table(head, body)]


def _rank(first: list[float], second: list[float]) -> float:
    found: Any = spearmanr(first, second)
    return float(found.statistic)


def draw() -> None:
    """Writes the table of all rows."""
    rows = read_rows(FILE)
    names = [column.removesuffix(" nats") for column in rows[0] if column.endswith(" nats")]
    lines = ["# A real model, several domains", "", f"{machine()}; {versions('torch', 'transformers', 'regraft')}", ""]
    lines += [
        "Nats per token over the dense model on held-out text; means over calibration draws, with 95 % intervals where there are several.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        dense = {row["held"]: row for row in mine if row["method"] == "dense"}  # losses compare on the same held-out windows only
        lines += [f"## {model}", ""]
        for held, row in dense.items():
            losses = ", ".join(f"{name} {float(row[f'{name} nats']):.3f}" for name in names)
            lines += [f"Dense, on {held} held-out windows of each domain: {losses} nats; repeated runs {float(row['repeated']):.2f}.", ""]
        for ratio in dict.fromkeys(row["ratio"] for row in mine if row["method"] != "dense"):
            here = [row for row in mine if row["ratio"] == ratio and row["method"] != "dense"]
            body = [_cells(group, dense[group[0]["held"]], names) for group in _alike(here)]
            head = [
                "method",
                "calibration",
                "windows",
                "held out",
                "removed",
                *names,
                "worst",
                "repeated",
                "processor s",
                "peak GB",
                "draws",
            ]
            lines += [f"### {float(ratio):.0%} asked for", "", *table(head, body)]
    lines += _growth_lines()
    FILE.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _alike(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["calibration"], row["windows"], row["held"]), []).append(row)
    return list(found.values())


def _cells(group: list[dict[str, str]], dense: Mapping[str, str], names: list[str]) -> list[str]:
    over = {name: [float(row[f"{name} nats"]) - float(dense[f"{name} nats"]) for row in group] for name in names}
    worst = [max(values[place] for values in over.values()) for place in range(len(group))]
    plain = [sum(float(row[key]) for row in group) / len(group) for key in ("removed", "repeated", "processor seconds", "peak GB")]
    cells = [group[0]["method"], group[0]["calibration"], group[0]["windows"], group[0]["held"], f"{plain[0]:.1%}"]
    cells += [_mean(values) for values in (*over.values(), worst)]
    return [*cells, f"{plain[1]:.2f}", f"{plain[2]:.0f}", f"{plain[3]:.2f}", str(len(group))]


def _mean(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if half != half else f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--domains")
    parser.add_argument("--own", default="wiki")
    parser.add_argument("--ratio", default="0.2,0.1,0.3,0.5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument(
        "--only", default="", help="METHOD|CALIBRATION, or a part of it, between semicolons: each chooses rows, in this order"
    )
    parser.add_argument("--prices", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.row is not None:
        return one_row(asked)
    if asked.prices:
        return prices(asked)
    if asked.growth:
        growth()
    if asked.model is not None:
        domains = domains_in(asked.domains)
        own = next(domain for domain in domains if domain.name == asked.own)
        keys = ["|".join(key[:2]) for key in rows_of(domains, own)]
        chosen = [key for part in asked.only.split(";") for key in keys if part == key or (part not in keys and part in key)]
        for seed in range(asked.seeds):
            for ratio in asked.ratio.split(","):
                for key in dict.fromkeys(["dense|none", *chosen]):
                    where = ("0", "0") if key == "dense|none" else (ratio, str(seed))
                    columns = ("model", "method", "calibration", "ratio", "seed", "held")
                    done = {tuple(row[column] for column in columns) for row in read_rows(FILE)}
                    if (asked.model.name, *key.split("|"), *where, str(asked.windows)) not in done:
                        subprocess.run([sys.executable, *sys.argv, "--row", "|".join([key, *where])], check=False)
    draw()


if __name__ == "__main__":
    main()
