"""Time and memory of finding the groups of models of real sizes, without their weights.

    python benchmarks/discovery_real_sizes.py

Each family is looked at, and a model of the shapes below is made on the meta device and traced, in a process of its own: processor time of
both steps after all imports, and what the high-water mark of the resident memory grew by. The shapes are those of models of these names as
far as their makers' descriptions give them; no weights are needed, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

from common import RESULTS, machine, table, versions, write_rows

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5-4B": (
        "qwen3_5_text",
        {"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
         "head_dim": 256, "tie_word_embeddings": True},
    ),
    "LFM2-2.6B": (
        "lfm2",
        {"hidden_size": 2048, "intermediate_size": 10752, "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 8,
         "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "conv", FULL] * 10},
    ),
    "Granite 4 tiny": (
        "granitemoehybrid",
        {"vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512, "shared_intermediate_size": 1024, "num_hidden_layers": 40,
         "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6, "mamba_n_heads": 48,
         "mamba_d_state": 128, "layer_types": [FULL if index % 10 == 5 else LINEAR for index in range(40)], "tie_word_embeddings": True},
    ),
    "Nemotron-H-4B": (
        "nemotron_h",
        {"hidden_size": 3072, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "mamba_num_heads": 112, "mamba_head_dim": 64, "layers_block_type": ([LINEAR, "mlp"] * 6 + [FULL]) * 4},
    ),
    "Ministral 3 8B": (
        "ministral3",
        {"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": None},
    ),
    "Gemma 4 E4B": (
        "gemma4_text",
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8, "num_key_value_heads": 2,
         "num_kv_shared_layers": 18},
    ),
}  # fmt: skip


def measure(name: str) -> None:
    """Prints the figures of one model as JSON.

    Its imports are here, so that the process that starts these stays small: Linux counts the peak of a program from that of its parent.
    """
    from transformers import CONFIG_MAPPING

    from regraft.groups.discover import look_for
    from regraft.groups.traced.skeleton import without_weights
    from regraft.models.family import family_of
    from regraft.models.view import parameter_count

    family, values = SHAPES[name]
    config = CONFIG_MAPPING[family](**values)
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    family_of(family)
    looked = time.process_time()
    model: Any = without_weights(config)
    found = look_for(model, ("heads", "query_heads", "ffn", "attention", "mlp", "layer"))
    kinds = {kind: len(found.groups.of(kind)) for kind in ("heads", "query_heads", "ffn", "layer")}  # pyright: ignore[reportArgumentType]
    row = {
        "model": name,
        "family": family,
        "parameters": parameter_count(model),
        **{f"{kind}_groups": count for kind, count in kinds.items()},
        "family_seconds": round(looked - before, 2),
        "tracing_seconds": round(time.process_time() - looked, 2),
        "memory_grown_MB": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024),
        "memory_peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print(json.dumps(row))


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name in SHAPES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        rows.append({**json.loads(done.stdout.splitlines()[-1]), "machine": machine(), "versions": versions("torch", "transformers")})
    write_rows(RESULTS / "discovery_real_sizes.csv", rows)
    head = ["model", "parameters", "layers with heads", "query heads", "FFN", "that can go", "family, s", "tracing, s", "memory grown, MB"]
    head += ["peak, MB"]
    keys = (
        "heads_groups",
        "query_heads_groups",
        "ffn_groups",
        "layer_groups",
        "family_seconds",
        "tracing_seconds",
        "memory_grown_MB",
        "memory_peak_MB",
    )
    lines = ["# Groups of models of real sizes", "", "Written by `benchmarks/discovery_real_sizes.py`; do not edit by hand.", ""]
    lines += [f"{rows[0]['machine']}; {rows[0]['versions']}; processor time, one thread, without the imports.", ""]
    lines += table(head, [[row["model"], f"{row['parameters']:,}", *(str(row[key]) for key in keys)] for row in rows])
    (RESULTS / "discovery_real_sizes.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
