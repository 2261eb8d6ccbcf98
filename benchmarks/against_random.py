"""Every pair of criterion and selector that is offered, against random removal of the same size, on text that nothing has read.

    python benchmarks/against_random.py --model ../shared/models/stories3M --text ../shared/data/tinystories/train.txt
    python benchmarks/against_random.py --model seedling

The loss of random removal is the mean over three seeds of ``random`` with equal widths. A pair is sane where it loses less than that, and
must end with a warning where it loses more. Models are cut and not re-fitted, which would hide a bad choice. A row is written after every
pair, and pairs that have one are left alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, add_row, machine, read_rows, rounded, table, versions
from regraft.data.text import Corpus, read_corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.groups.discover import discover
from regraft.importance import CRITERIA
from regraft.models.load import Loaded, load, require_tokenizer
from regraft.models.view import ModelView
from regraft.pipelines.prune.prune import prune, replay
from regraft.pipelines.texts import text_for
from regraft.plans import PrunePlan, Scores
from regraft.selection import SELECTORS, Budget, select
from regraft.settings import PruneSettings

FILE = RESULTS / "against_random.csv"
SEEDS = (0, 1, 2)
CALIBRATION, HELD_OUT = 400, 60  # documents
UNITS = tuple(name for name in CRITERIA.names() if {"ffn", "heads"} <= set(CRITERIA.get(name).scores))
DEPTHS = tuple(name for name in CRITERIA.names() if "layer" in CRITERIA.get(name).scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seedling")
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--ratio", type=float, default=0.2)
    asked = parser.parse_args()
    loaded = load(asked.model)
    with tempfile.TemporaryDirectory() as name:
        texts = parts(loaded, asked.text, Path(name))
        for row in pairs():
            measure(loaded, {"model": Path(asked.model).name, **row, "ratio": asked.ratio}, *texts)
    draw()


def parts(loaded: Loaded, text: Path | None, folder: Path) -> tuple[Path, Corpus]:
    """Returns a file of calibration text, and text that nothing reads."""
    corpus = read_corpus(text, "test") if text is not None else text_for(loaded, None, "validation", "calibration")
    documents = corpus.documents
    held = documents[-min(HELD_OUT, max(1, len(documents) // 5)) :]
    for name, part in (("calibration", documents[: min(CALIBRATION, len(documents) - len(held))]), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": entry}) + "\n" for entry in part), encoding="utf-8")
    return folder / "calibration.jsonl", read_corpus(folder / "held.jsonl", "test")


def pairs() -> list[dict[str, Any]]:
    """Returns the baselines, then every pair; for depth the criterion alone decides, whatever the selector."""
    rows: list[dict[str, Any]] = []
    for targets, shape in (("heads,ffn", "per-layer"), ("heads,ffn", "uniform"), ("layers", "per-layer")):
        rows += [{"targets": targets, "shape": shape, "criterion": "random", "select": "uniform", "seed": seed} for seed in SEEDS]
        if targets == "layers":
            rows += [{"targets": targets, "shape": shape, "criterion": name, "select": "uniform", "seed": 0} for name in DEPTHS]
            continue
        for selector in SELECTORS.names():
            rows += [
                {"targets": targets, "shape": shape, "criterion": name, "select": selector, "seed": 0}
                for name in UNITS
                if name != "random" or selector != "uniform"
            ]
    return rows


def measure(loaded: Loaded, row: dict[str, Any], calibration: Path, held: Corpus) -> None:
    """Prunes by one pair and appends its row, unless it is there."""
    known = {tuple(str(value) for value in list(kept.values())[: len(row)]) for kept in read_rows(FILE)}
    if tuple(str(value) for value in row.values()) in known:
        return
    usual = {"calibration": calibration, "samples": 24, "seq_len": 64, "reconstruct": "none", "targets": tuple(row["targets"].split(","))}
    given = {name: row[name] for name in ("shape", "ratio", "select")}
    if row["targets"] != "layers":
        result = prune(loaded, None, PruneSettings.model_validate(usual | given | {"criterion": row["criterion"]}), seed=row["seed"])
    elif row["criterion"] != "random":
        result = prune(loaded, None, PruneSettings.model_validate(usual | given | {"depth": row["criterion"]}))
    else:
        result = replay(loaded, random_layers(loaded, row["ratio"], row["seed"]), None, PruneSettings(reconstruct="none", criterion="l2"))
    assert result.model is not None
    loss = evaluate_loss(result.model, require_tokenizer(loaded), held).loss_nats
    warned = [note for note in result.notes if "random removal of the same size" in note]
    said = warned[0].partition(" random removal")[0] if warned else ""
    add_row(FILE, row | {"achieved": f"{result.plan.achieved:.4f}", "held_out_nats": f"{loss:.4f}", "warning": said})
    print(row, loss, said, flush=True)


def random_layers(loaded: Loaded, ratio: float, seed: int) -> PrunePlan:
    """Returns a plan that removes random layers."""
    groups = discover(ModelView(loaded.model), ("layer",))
    chance = random.Random(seed)
    scores = Scores(groups.fingerprint, "random", {group.name: (chance.random(),) * group.units for group in groups.groups})
    return select("uniform", groups, scores, Budget(ratio, "per-layer", tuple(range(groups.layers)), ("layer",), 1))


def draw() -> None:
    """Draws the table."""
    rows = read_rows(FILE)
    lines = ["# Criteria and selectors against random removal", "", f"{machine()}; {versions('regraft', 'torch', 'transformers')}", ""]
    lines += ["Loss on held-out text in nats a token; cut without a re-fit. `random`: mean over three seeds, equal widths.", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        for targets, shape in dict.fromkeys((row["targets"], row["shape"]) for row in rows if row["model"] == model):
            here = [row for row in rows if (row["model"], row["targets"], row["shape"]) == (model, targets, shape)]
            lines += [f"## {model}, {targets}, {shape}, {float(here[0]['ratio']):.0%}", "", *_table(here)]
    (FILE.with_suffix(".md")).write_text("\n".join(lines), encoding="utf-8")


def _table(rows: list[dict[str, str]]) -> list[str]:
    chances = [float(row["held_out_nats"]) for row in rows if (row["criterion"], row["select"]) == ("random", "uniform")]
    chance = statistics.fmean(chances) if chances else None
    body: list[list[str]] = [["random", "uniform", rounded(chance), "", ""]] if chance is not None else []
    for row in rows:
        if (row["criterion"], row["select"]) == ("random", "uniform"):
            continue
        than = "" if chance is None else ("worse" if float(row["held_out_nats"]) > chance else "better")
        body.append([row["criterion"], row["select"], rounded(row["held_out_nats"]), than, row["warning"]])
    return table(("criterion", "select", "held-out nats", "than chance", "the warning says"), body)


if __name__ == "__main__":
    main()
