"""Memory and time of pruning a checkpoint by exact Taylor scores with a bound of memory, on a Llama of random weights.

    python benchmarks/pruning_memory.py [--shape 7b] [--memory 4GB] [--work DIR] [--threads 2] [--whole]

Makes the checkpoint (bfloat16, shard by shard), prunes it by the command line in a process of its own, and watches that process: its
resident memory every 20 ms, the high-water mark of the kernel, and the bytes that it read and wrote. Beside it stand two floors: the
time to read the checkpoint and write the result once on this disk, and the floating-point operations of the three passes. ``--whole``
also prunes with the model in memory, for small shapes. Each run adds its row to ``benchmarks/results/pruning_memory.csv`` in place of
an older row of the same kind, and the table is drawn from that file.

The random weights say nothing about quality; memory, bytes and operations do not depend on them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from common import table
from regraft.data.text import read_corpus

RESULTS = Path(__file__).parent / "results"
# Hidden size, feed-forward width, layers, heads, key-value heads, vocabulary.
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "3b": (3200, 8640, 26, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "300m": (1024, 2816, 24, 16, 16, 32000),
    "100m": (768, 2048, 10, 12, 12, 32000),
}
SEED, BLOCK = 0, 1 << 26


@dataclass(frozen=True)
class Row:
    """One measured run."""

    shape: str
    way: str
    parameters: int
    checkpoint_gb: float
    bound_gb: float
    peak_rss_gb: float
    kernel_peak_gb: float
    seconds: float
    cpu_seconds: float
    read_gb: float
    written_gb: float
    io_floor_seconds: float
    tera_flop: float
    gflop_per_second: float
    removed: float
    samples: int
    seq_len: int
    threads: int
    load: float
    machine: str
    versions: str
    seed: int


def make_checkpoint(folder: Path, shape: str, layers: int | None) -> None:
    """Writes a Llama of random weights, one layer a shard. Runs in a process of its own, so that the watcher stays small."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    hidden, ffn, count, heads, kv_heads, vocabulary = SHAPES[shape]
    count = layers or count
    head_dim = hidden // heads
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=count, num_attention_heads=heads, num_key_value_heads=kv_heads,
        vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + index for index, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    generator = torch.Generator().manual_seed(SEED)

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size).normal_(0.0, 0.02, generator=generator).to(torch.bfloat16)

    def layer(index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}."
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
        norms = {
            f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in ("input_layernorm", "post_attention_layernorm")
        }
        return norms | {f"{prefix}{name}.weight": normal(*size) for name, size in shapes.items()}

    parts = [lambda: {"model.embed_tokens.weight": normal(vocabulary, hidden)}]
    parts += [lambda index=index: layer(index) for index in range(count)]
    parts += [lambda: {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16), "lm_head.weight": normal(vocabulary, hidden)}]
    where: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name, tensors = f"model-{number:05}-of-{len(parts):05}.safetensors", part()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def watch(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Runs a command and returns its peaks, times and bytes."""
    started = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    process = psutil.Process(child.pid)
    peak, kernel, counted = 0, 0, (0, 0)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        try:
            peak = max(peak, process.memory_info().rss)
            status_text = Path(f"/proc/{child.pid}/status").read_text()
            kernel = max(kernel, *(int(line.split()[1]) * 1024 for line in status_text.splitlines() if line.startswith("VmHWM")), 0)
            io: Any = process.io_counters()  # on Linux it counts characters too
            counted = (io.read_chars, io.write_chars)
        except (psutil.Error, OSError):
            pass
        time.sleep(0.02)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed with {child.returncode}: {' '.join(command)}")
    return {
        "peak_rss_gb": peak / 1e9,
        "kernel_peak_gb": max(kernel, usage.ru_maxrss * 1024) / 1e9,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "read_gb": counted[0] / 1e9,
        "written_gb": counted[1] / 1e9,
    }


def io_floor(source: Path, output: Path, work: Path) -> float:
    """Returns the seconds it takes to read the checkpoint and to write as many bytes as the result has, once."""
    started = time.perf_counter()
    buffer = bytearray(BLOCK)
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while stream.readinto(buffer):
                pass
    left = weight_bytes(output)
    with (work / "floor.bin").open("wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(memoryview(buffer)[: min(left, BLOCK)])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    (work / "floor.bin").unlink()
    return seconds


def flop(shape: str, layers: int | None, tokens: int) -> float:
    """Returns the operations of the passes: 2 forward, 2 forward again, 4 backward for each weight of a layer, 2 + 4 for the head's."""
    hidden, ffn, count, heads, kv_heads, vocabulary = SHAPES[shape]
    layer = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv_heads) + 3 * hidden * ffn
    return tokens * (8.0 * (layers or count) * layer + 6.0 * vocabulary * hidden)


def gflop_per_second(threads: int, environment: dict[str, str]) -> float:
    """Returns the speed of a large product in float32, the median of five, in a process of its own."""
    script = (
        "import statistics, time, torch\n"
        f"torch.set_num_threads({threads})\n"
        "a, b, t = torch.randn(640, 4096), torch.randn(4096, 4096), []\n"
        "for _ in range(7):\n    s = time.perf_counter(); a @ b; t.append(time.perf_counter() - s)\n"
        "print(2 * 640 * 4096 * 4096 / statistics.median(t[2:]) / 1e9)"
    )
    return float(subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout)


def measure(options: argparse.Namespace, work: Path) -> list[Row]:
    source = work / "model"
    label = options.shape + (f", {options.layers} layers" if options.layers else "")
    making = [sys.executable, __file__, "--shape", options.shape, "--make", str(source)]
    subprocess.run([*making, *(["--layers", str(options.layers)] if options.layers else [])], check=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "REGRAFT_REPORT": "0",
    }
    text = work / "calibration.txt"
    text.write_text("\n<|endoftext|>\n".join(read_corpus(None, "validation").documents), encoding="utf-8")
    usual = [
        sys.executable, "-m", "regraft", "prune", str(source), "--calibration", str(text), "--shape", "per-layer", "--criterion", options.criterion, "--order", options.order,
        "--select", "global", "--ratio", "0.2", "--samples", str(options.samples), "--seq-len", str(options.seq_len),
        "--reconstruct", options.reconstruct, "--device", options.device, "--seed", str(SEED),
    ]  # fmt: skip
    ways = {f"--memory {options.memory}": ["--memory", options.memory]} | ({"whole model in memory": []} if options.whole else {})
    rows: list[Row] = []
    for way, more in ways.items():
        output = work / "pruned"
        load = os.getloadavg()[0]
        found = watch([*usual, *more, "--output", str(output)], environment)
        record = json.loads((output / "regraft.json").read_text())
        plan = record["plan"]
        refit = "" if options.reconstruct == "none" else f", {options.reconstruct}"
        rows.append(
            Row(
                shape=label,
                way=f"{options.criterion} {options.order}{refit}, {options.device}, {way}",
                parameters=plan["parameters_before"],
                checkpoint_gb=weight_bytes(source) / 1e9,
                bound_gb=bytes_in(options.memory) / 1e9 if more else float("nan"),
                io_floor_seconds=io_floor(source, output, work),
                tera_flop=flop(options.shape, options.layers, options.samples * options.seq_len) / 1e12,
                gflop_per_second=gflop_per_second(options.threads, environment),
                removed=1 - plan["parameters_after"] / plan["parameters_before"],
                samples=options.samples,
                seq_len=options.seq_len,
                threads=options.threads,
                load=load,
                machine=f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB, {processor()}",
                versions=", ".join(f"{name} {version(name)}" for name in ("regraft", "torch", "transformers", "safetensors")),
                seed=SEED,
                **found,
            )
        )
        shutil.rmtree(output)
        print(rows[-1], flush=True)
    return rows


def bytes_in(amount: str) -> float:
    units = {"GB": 1e9, "MB": 1e6}
    return float(amount[:-2]) * units[amount[-2:].upper()]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def keep(rows: list[Row]) -> None:
    """Puts rows into the results in place of older ones of the same kind, and draws the table anew."""
    path = RESULTS / "pruning_memory.csv"
    known: dict[tuple[str, str], dict[str, str]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as stream:
            known = {(row["shape"], row["way"]): row for row in csv.DictReader(stream)}
    for row in rows:
        known[row.shape, row.way] = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in asdict(row).items()
        }
    RESULTS.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(known.values(), key=lambda row: (int(row["parameters"]), row["way"])))
    draw(path)


def draw(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    lines = [
        "# Memory of pruning",
        "",
        "Written by `python benchmarks/pruning_memory.py`: Llamas of random weights in bfloat16 on disk, 20 % of the parameters removed by "
        "exact Taylor scores with one threshold, nothing re-fitted unless said. Peak memory is the resident memory of the whole process, "
        "libraries included, sampled every 20 ms; in brackets the kernel's own high-water mark. The original implementation of these "
        "scores is reported to take about 80 GB for a model of 7 B parameters.",
        "",
        "The floor of input and output is the time to read the checkpoint and write the result once, on the same disk, with the checkpoint "
        "dropped from the page cache. The floor of arithmetic is the operations of the passes (forward, forward again, backward: 8 for "
        "each weight of a layer and each token) over the speed of one large product, measured right after.",
        "",
    ]
    head = ["model", "parameters", "how", "peak memory, GB", "time (of processors), s", "read / written, GB", "floor of in- and output, s"]
    head += ["operations, TFLOP", "floor of arithmetic, s", "load before"]
    body: list[list[str]] = []
    for row in rows:
        arithmetic = float(row["tera_flop"]) * 1000 / float(row["gflop_per_second"])
        text = f"{row['samples']} x {row['seq_len']} tokens"
        body.append([f"{row['shape']}, {float(row['checkpoint_gb']):.2f} GB", f"{int(row['parameters']):,}", f"{row['way']}, {text}"])
        body[-1] += [
            f"{float(row['peak_rss_gb']):.2f} ({float(row['kernel_peak_gb']):.2f})",
            f"{float(row['seconds']):.0f} ({float(row['cpu_seconds']):.0f})",
            f"{float(row['read_gb']):.1f} / {float(row['written_gb']):.1f}",
            f"{float(row['io_floor_seconds']):.0f}",
            f"{float(row['tera_flop']):.1f}",
            f"{arithmetic:.0f}",
            f"{float(row['load']):.1f}",
        ]
    lines += table(head, body)
    machines = dict.fromkeys(f"{row['machine']}, {row['threads']} threads, {row['versions']}, seed {row['seed']}" for row in rows)
    lines += [*(f"Machine: {machine}." for machine in machines), ""]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers of the same shape")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--order", default="first")
    parser.add_argument("--reconstruct", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--whole", action="store_true", help="also with the model in memory")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and the result; default: the system's for temporary files")
    parser.add_argument("--dry", action="store_true", help="print, and keep nothing in the results")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make_checkpoint(options.make, options.shape, options.layers)
        return
    with tempfile.TemporaryDirectory(prefix="pruning-memory-", dir=options.work) as work:
        rows = measure(options, Path(work))
    if not options.dry:
        keep(rows)


if __name__ == "__main__":
    main()
