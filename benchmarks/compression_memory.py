"""Memory and time of compressing a checkpoint with a bound of memory, on a Llama of random weights with the shapes of a 7B model.

    python benchmarks/compression_memory.py [--shape 7b] [--layers 2] [--memory 4GB] [--method fisher]

The checkpoint is that of ``pruning_memory.py``, and so is the watcher of the process. Memory does not grow with the number of layers, because
one layer is read, decomposed and written at a time; time does, so that few layers are enough.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pruning_memory
from common import RESULTS, add_row, machine, read_rows, table, versions
from regraft.data.text import read_corpus

FILE = RESULTS / "compression_memory.csv"


def main() -> None:
    """Measures one method, and writes ``compression_memory.csv`` and ``compression_memory.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=pruning_memory.SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--method", default="fisher")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--note", default="", help="what else ran on the machine, for the page")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source, output, text = Path(place) / "model", Path(place) / "thin", Path(place) / "text.txt"
        # In a process of its own, so that the watcher stays small.
        making = [sys.executable, pruning_memory.__file__, "--shape", asked.shape, "--layers", str(asked.layers), "--make", str(source)]
        subprocess.run(making, check=True)
        text.write_text("\n<|endoftext|>\n".join(read_corpus(None, "validation").documents), encoding="utf-8")
        command = [sys.executable, "-m", "regraft", "compress", str(source), "--method", asked.method, "--ratio", "0.2"]
        command += ["--calibration", str(text), "--samples", str(asked.samples), "--seq-len", str(asked.seq_len)]
        command += ["--memory", asked.memory, "--output", str(output), "--device", "cpu"]
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "REGRAFT_REPORT": "0"}
        found = pruning_memory.watch(command, os.environ | quiet)
        row: dict[str, object] = {"shape": asked.shape, "layers": asked.layers, "method": asked.method, "bound": asked.memory}
        row |= {
            "checkpoint_gb": f"{pruning_memory.weight_bytes(source) / 1e9:.2f}",
            "written": f"{pruning_memory.weight_bytes(output) / 1e9:.2f}",
        }
        row |= {name: f"{value:.4g}" for name, value in found.items()}
        row |= {
            "samples": asked.samples,
            "seq_len": asked.seq_len,
            "machine": machine(),
            "versions": versions("torch", "transformers", "regraft"),
        }
        add_row(FILE, row | {"note": asked.note})
    draw()


def draw() -> None:
    """Writes the table."""
    rows = read_rows(FILE)
    head = ["model", "layers", "method", "bound", "peak memory, GB", "seconds (of a processor)", "weights, GB", "calibration"]
    body = [
        [
            row["shape"],
            row["layers"],
            row["method"],
            row["bound"],
            f"{float(row['peak_rss_gb']):.2f} ({float(row['kernel_peak_gb']):.2f})",
            f"{float(row['seconds']):.0f} ({float(row['cpu_seconds']):.0f})",
            f"{row['checkpoint_gb']} -> {row['written']}",
            f"{row['samples']} x {row['seq_len']} tokens",
        ]
        for row in rows
    ]
    words = (
        "Llamas of random bfloat16 weights on disk, 20 % removed by `regraft compress --memory`. Peak memory is that of the whole process,"
    )
    words += " libraries included, sampled every 20 ms; in brackets the kernel's own high-water mark."
    notes = [f"{row['machine']}; {row['versions']}. {row['note']}".strip() for row in rows]
    lines = ["# Memory of compression", "", words, "", *table(head, body), *dict.fromkeys(notes), ""]
    FILE.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
