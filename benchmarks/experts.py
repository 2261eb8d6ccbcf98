"""Time of scoring experts with all experts in one call (`grouped_mm`) against the loop over experts (`eager`), in one run.

    python benchmarks/experts.py

Random models of two shapes, 8 windows of 256 tokens; scores by router weight times norm of the output. Both ways are measured in turns, five
times each, in processor time; the table has the medians and their ratio, and the largest relative difference of the scores.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common import RESULTS, machine, table, versions, write_rows
from regraft.importance.experts import score_experts
from regraft.models.layerwise import WholeWalk
from regraft.models.view import ModelView

WINDOWS, TOKENS, REPEATS = 8, 256, 5
WAYS = ("grouped_mm", "eager")
COMMON: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral's, 8 experts of 512, 2 a token": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512}),
    "OLMoE's, 64 experts of 128, 8 a token": ("olmoe", {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 128}),
}


def scored(model: Any, windows: torch.Tensor, way: str) -> tuple[float, torch.Tensor]:
    """Returns the processor time of scoring all experts, in seconds, and the scores."""
    model.set_experts_implementation(way)
    walk = WholeWalk(ModelView(model), windows)
    before = time.process_time()
    values = score_experts(walk, "").values
    return time.process_time() - before, torch.tensor(list(values.values()))


def forward(model: Any, windows: torch.Tensor, way: str) -> float:
    """Returns the processor time of one forward pass, in seconds."""
    model.set_experts_implementation(way)
    before = time.process_time()
    with torch.no_grad():
        model(windows, use_cache=False)
    return time.process_time() - before


def main() -> int:
    """Measures both shapes and writes the table."""
    torch.set_num_threads(1)
    rows: list[dict[str, str]] = []
    for name, (kind, values) in SHAPES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**COMMON, **values)).eval()
        windows = torch.randint(3, 512, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(1))
        times: dict[tuple[str, str], list[float]] = {}
        scores: dict[str, torch.Tensor] = {}
        for repeat in range(REPEATS + 1):
            for way in WAYS:
                seconds, scores[way] = scored(model, windows, way)
                if repeat:  # the first one warms up
                    times.setdefault(("scoring", way), []).append(seconds)
                    times.setdefault(("forward", way), []).append(forward(model, windows, way))
        apart = float(((scores["grouped_mm"] - scores["eager"]).abs() / scores["eager"].abs().clamp_min(1e-9)).max())
        for what in ("scoring", "forward"):
            fast, loop = (statistics.median(times[what, way]) for way in WAYS)
            rows.append(
                {
                    "shape": name,
                    "what": what,
                    "one call, s": f"{fast:.3f}",
                    "loop, s": f"{loop:.3f}",
                    "loop / one call": f"{loop / fast:.2f}",
                    "scores apart": f"{apart:.1e}",
                }
            )
            print(*rows[-1].values(), sep=" | ", flush=True)
    write_rows(RESULTS / "experts.csv", rows)
    lines = ["# Experts in one call against the loop", "", "Written by `benchmarks/experts.py`; do not edit by hand.", ""]
    lines += [f"{machine()}; {versions('torch', 'transformers')}; one thread, seeds 0 and 1.", ""]
    lines += [*table(tuple(rows[0]), [tuple(row.values()) for row in rows])]
    (RESULTS / "experts.md").write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
