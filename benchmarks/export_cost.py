"""Time and memory of exporting a checkpoint with the shapes of a 7B model, beside copying its files.

    python benchmarks/export_cost.py --layers 3

Random bfloat16 weights of Llama 2 7B's shapes, with fewer layers where disk or time is short: time goes with the bytes, peak memory with the
largest tensor. Each copy and each export runs in a process of its own that has the same libraries loaded, so that the system finds both in
the same state: fresh memory for the page cache takes longer than the copy itself on some virtual machines. Exports are without comparison,
both are flushed to the disk, and each export is compared with the copy made just before it; the medians of the runs count. The starting of
Python and its libraries is not in the time; it is in the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from common import add_row, machine, read_rows, table, versions
from regraft.streaming.output import shards_of
from regraft.streaming.writer import ShardWriter

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
# The peak as Linux counts it for a program: ``ru_maxrss`` starts from that of the process that started it.
PEAK = """
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
"""
COPY = """
import json, os, pathlib, shutil, sys, time
from regraft.pipelines.export import export
start = time.perf_counter()
os.mkdir(sys.argv[2])
for file in pathlib.Path(sys.argv[1]).glob("*.safetensors"):
    shutil.copyfile(file, os.path.join(sys.argv[2], file.name))
    with open(os.path.join(sys.argv[2], file.name), "rb") as stream:
        os.fsync(stream.fileno())
print(json.dumps([time.perf_counter() - start, peak()]))
"""
EXPORT = """
import json, sys, time
from regraft.pipelines.export import export
from regraft.settings import ExportSettings
start = time.perf_counter()
export(sys.argv[1], sys.argv[2], sys.argv[3], settings=ExportSettings(quantize=sys.argv[4]), check=None)
print(json.dumps([time.perf_counter() - start, peak()]))
"""
TARGETS = (("hf", ""), ("hf-uniform", ""), ("gguf", ""), ("gguf", "F16"), ("gguf", "Q8_0"))


def main() -> None:
    """Measures and writes ``export_cost.csv`` and ``export_cost.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--note", default="", help="what else ran on the machine, for the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        nbytes = make(folder, arguments.layers)
        copies: dict[tuple[str, str], list[float]] = {target: [] for target in TARGETS}
        exports: dict[tuple[str, str], list[tuple[float, int]]] = {target: [] for target in TARGETS}
        for _ in range(arguments.runs):
            for to, quantize in TARGETS:
                copies[to, quantize].append(measured(PEAK + COPY, folder, Path(place) / "copy")[0])
                exports[to, quantize].append(measured(PEAK + EXPORT, folder, Path(place) / "out", to, quantize))
        for (to, quantize), found in exports.items():
            times, before = [time for time, _ in found], copies[to, quantize]
            row = {"to": to, "type": quantize or "BF16", "layers": arguments.layers, "bytes": nbytes}
            row |= {"copy_seconds": round(median(before), 2), "seconds": round(median(times), 2)}
            row |= {"ratio": round(median(one / other for one, other in zip(times, before, strict=True)), 2)}
            row |= {"peak_bytes": max(size for _, size in found), "runs": arguments.runs, "note": arguments.note}
            add_row(
                arguments.output / "export_cost.csv", row | {"machine": machine(), "versions": versions("torch", "gguf", "safetensors")}
            )
    write_page(arguments.output / "export_cost.md", read_rows(arguments.output / "export_cost.csv"))


def make(folder: Path, layers: int) -> int:
    """Writes a random checkpoint, and returns its bytes."""
    folder.mkdir()
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SHAPE)
    config.save_pretrained(folder)
    width, inner, rows = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{start}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (rows, width)}
    (shard,) = shards_of([(None, shapes)], torch.bfloat16, 1 << 62)
    with ShardWriter(folder, shard) as writer:
        for name, shape in shapes.items():
            writer.write(name, [torch.randn(shape, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return shard.nbytes


def measured(code: str, folder: Path, output: Path, *more: str) -> tuple[float, int]:
    """Returns seconds and peak memory of a copy or an export."""
    os.sync()  # what earlier work still has to write would slow this one down
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(output), *more], stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(output)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), int(peak)


def write_page(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the table."""
    first = rows[0]
    lines = [
        "# Export of a 7B-shaped checkpoint",
        "",
        f"`benchmarks/export_cost.py`: {first['layers']} layers of Llama 2 7B's shape, {int(first['bytes']) / 1e9:.2f} GB in bfloat16, no "
        f"comparison; medians of {first['runs']} runs, each export beside the copy before it. {first['machine']}; {first['versions']}. {first['note']}",
        "",
    ]
    body = [
        [
            row["to"],
            row["type"],
            row["seconds"],
            row["copy_seconds"],
            f"{float(row['ratio']):.2f}",
            f"{int(row['peak_bytes']) / 1e9:.2f}",
        ]
        for row in rows
    ]
    head = ("format", "type", "seconds", "copying, seconds", "ratio", "peak memory, GB")
    path.write_text("\n".join([*lines, *table(head, body), ""]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
