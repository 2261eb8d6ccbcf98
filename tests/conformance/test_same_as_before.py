"""Eleven small commands give the weights and the decisions that they gave before the rooms were moved.

``same_as_before.json`` beside this file was recorded at commit ad0f2b1. For every weight file it holds a SHA-256 of the tensors and,
for each tensor, three projections on fixed waves. On a machine like the one of the recording (the same processor features, PyTorch and
BLAS) the SHA-256 must agree to the bit. Elsewhere sums of floating-point numbers are taken in another order, so that there the
projections must agree to ``ELSEWHERE`` of the tensor's norm: with PyTorch's kernels without AVX on the machine of the recording the
worst tensor, an adapter after six optimizer steps, was off by 1e-5, what was only pruned by 2e-6, and losses by 6e-7. The decisions
(units kept, ranks, counts of parameters, windows of text) are compared exactly in both cases.

Every setting that has a bearing is given, so that a change of a default is not felt here. To record anew, after a change of results
that is meant and explained in the changelog:  PYTHONPATH=tests OMP_NUM_THREADS=1 python tests/conformance/test_same_as_before.py --record
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fresh
from tiny_inputs import make_inputs

RECORDED = Path(__file__).with_name("same_as_before.json")
ELSEWHERE = 5e-5
LOSS = 1e-5

LOAD = "--device cpu --dtype float32"
CALIBRATE = f"--calibration text.txt --samples 8 --seq-len 16 --seed 3 {LOAD}"
SCORE = "--order first --granularity element --reduce sum --budget parameters --rounds 1 --layers : --depth block_influence"
PRUNE = f"--targets heads,ffn {SCORE} {CALIBRATE}"
UNEVEN = f"--shape per-layer --ratio 0.3 --align 1 {PRUNE}"
STEPS = f"--data text.txt --seq-len 16 --seed 3 --steps 6 --batch 2 --accumulate 1 --precision float32 {LOAD}"
RATES = "--lr 0.003 --lr-ratio 1 --schedule cosine --warmup 0.05 --max-grad-norm 1"
TRAIN = f"{STEPS} {RATES} --eval-every 3 --held-out 0.2 --held-out-windows 64"

# Name of the folder or file that is written, and the command.
COMMANDS = {
    "l2": f"prune model --criterion l2 --ratio 0.35 --shape uniform --select uniform --reconstruct none --align 1 {PRUNE}",
    "taylor": f"prune model --criterion taylor --select knapsack --reconstruct least_squares {UNEVEN}",
    "surgeon": f"prune model --effort thorough --criterion surgeon --select knapsack --reconstruct divergence {UNEVEN}",
    "seedling": f"prune seedling --criterion surgeon --ratio 0.2 --shape uniform --select auto --reconstruct auto --align 16 {PRUNE}",
    "memory": f"prune model --criterion wanda --select uniform --reconstruct least_squares --memory 1GB {UNEVEN}",
    "ranks.json": f"allocate taylor --method proportional --budget r=4 --granularity layer --ranks 2,4,6,8 --samples 4 {TRAIN}",
    "lora": f"recover taylor --adapter lora --rank 4 --alpha 8 --dropout 0 --no-merge --quiet {TRAIN}",
    "ranked": f"recover taylor --adapter lora --ranks ranks.json --dropout 0.05 --merge --quiet {TRAIN}",
    "deep": f"recover l2 --adapter deep_lora --rank 4 --dropout 0 --no-merge --quiet {TRAIN}",
    "plain": f"export deep --to peft-lora {LOAD}",
    "recipe": "run recipe.yaml",
}


def run_commands() -> None:
    """Runs every command in the current folder, in one process and on one thread."""
    from regraft.cli.app import run

    torch.set_num_threads(1)
    make_inputs()
    for name, command in COMMANDS.items():
        first, *rest = command.split()
        code = run([first, *rest, "--output", name])
        if code != 0:
            sys.exit(f"{command}: exit code {code}")


def machine() -> dict[str, str]:
    """What decides in which order floating-point numbers are added."""
    capability = torch.backends.cpu.get_cpu_capability()
    blas = [line for line in torch.__config__.show().splitlines() if "Math Kernel" in line or "MKL-DNN" in line]
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {
        line.partition(":")[0].strip(): line.partition(":")[2].strip()
        for line in lines
        if line.startswith(("vendor_id", "cpu family", "model\t"))
    }
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "capability": capability,
        "blas": "; ".join(map(str.strip, blas)),
        "cpu": str(cpu),
    }


def project(tensor: torch.Tensor) -> list[float]:
    """Three projections of a tensor on fixed waves, and its norm."""
    flat = tensor.double().numpy().reshape(-1)
    index = np.arange(flat.size)
    values = [float(flat @ np.cos(0.1 + speed * index)) for speed in (0.7, 1.3, 2.9)] + [float(np.linalg.norm(flat))]
    return [float(f"{value:.9g}") for value in values]


def weights(path: Path) -> dict[str, Any]:
    """SHA-256 over names, types, shapes and bytes of all tensors of a file (its metadata are left out), and their projections."""
    tensors = load_file(path)
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"sha256": total.hexdigest(), "projections": {name: project(tensors[name]) for name in sorted(tensors)}}


def decisions(folder: Path) -> dict[str, Any]:
    """What the records of a folder decided: units, ranks, counts, the windows of text; and the losses."""
    found: dict[str, Any] = {}
    record = json.loads((folder / "regraft.json").read_text(encoding="utf-8"))
    records = {"": record} | {f"parent {number} ": parent for number, parent in enumerate(record.get("parents", []))}
    for name, values in records.items():
        found[f"{name}seed"] = values["seed"]
        if plan := values.get("plan"):
            keys = ("selection", "shape", "ratio", "align", "parameters_before", "parameters_after", "cuts")
            found[f"{name}plan"] = {key: plan[key] for key in keys}
            found[f"{name}windows"] = plan["made_with"]["windows_sha256"]
        if ranks := values.get("ranks"):
            found[f"{name}ranks"] = {key: ranks[key] for key in ("method", "ranks", "alpha_per_rank", "trainable_parameters")}
    if (folder / "adapter.json").exists():
        adapter = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        found["adapter"] = {key: adapter[key] for key in ("method", "options", "modules")}
    if (folder / "adapter_config.json").exists():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        found["adapter"] = {key: adapter[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout")}
    if (folder / "training_log.csv").exists():
        rows = list(csv.DictReader((folder / "training_log.csv").read_text(encoding="utf-8").splitlines()))
        found["losses"] = [[float(row[key]) for key in ("step", "train_loss_nats", "held_out_loss_nats") if row[key]] for row in rows]
    return found


def measure(work: Path) -> dict[str, Any]:
    """Weights and decisions of everything that the commands wrote into ``work``."""
    folders = {name: work / name for name in COMMANDS if name not in ("ranks.json", "recipe")}
    folders |= {"recipe pruned": work / "recipe" / "pruned", "recipe model": work / "recipe" / "model"}
    measured: dict[str, Any] = {}
    for name, folder in folders.items():
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"{name}: no weights"
        measured[name] = {"weights": {path.name: weights(path) for path in files}, "decisions": decisions(folder)}
    ranks = json.loads((work / "ranks.json").read_text(encoding="utf-8"))
    kept = {key: ranks[key] for key in ("method", "ranks", "alpha_per_rank", "trainable_parameters")}
    return {"machine": machine(), "outputs": measured, "ranks.json": kept}


def in_a_process_of_its_own(work: Path) -> dict[str, Any]:
    """Runs the commands on one thread in a new process, which no other test can have changed, and measures what they wrote."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = fresh.run([__file__, "--run"], env=environment, cwd=work)  # its server has one thread
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return measure(work)


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_process_of_its_own(tmp_path_factory.mktemp("same"))


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


OUTPUTS = [*(name for name in COMMANDS if name not in ("ranks.json", "recipe")), "recipe pruned", "recipe model"]


@pytest.mark.long
@pytest.mark.parametrize("name", OUTPUTS)
def test_the_weights_are_the_same(now: dict[str, Any], before: dict[str, Any], name: str) -> None:
    assert set(now["outputs"]) == set(before["outputs"]) == set(OUTPUTS)
    got, want = now["outputs"][name]["weights"], before["outputs"][name]["weights"]
    assert got.keys() == want.keys()
    for file, wanted in want.items():
        assert different(got[file]["projections"], wanted["projections"]) == []
        if now["machine"] == before["machine"]:
            assert got[file]["sha256"] == wanted["sha256"], (
                f"{name}/{file}: near, but not the same bytes, on a machine like that of the recording"
            )


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_decisions_are_the_same(now: dict[str, Any], before: dict[str, Any], name: str) -> None:
    got, want = dict(now["outputs"][name]["decisions"]), dict(before["outputs"][name]["decisions"])
    losses, wanted = got.pop("losses", []), want.pop("losses", [])
    assert got == want
    assert len(losses) == len(wanted)
    for row, other in zip(losses, wanted, strict=True):
        assert row == pytest.approx(other, abs=0 if now["machine"] == before["machine"] else LOSS)


def test_the_ranks_are_the_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now["ranks.json"] == before["ranks.json"]


def different(got: dict[str, list[float]], want: dict[str, list[float]]) -> list[str]:
    """Names of the tensors whose projections differ by more than ``ELSEWHERE`` of the norm, or that only one side has."""
    names = got.keys() ^ want.keys()
    for name in got.keys() & want.keys():
        if not np.allclose(got[name], want[name], rtol=0, atol=ELSEWHERE * max(want[name][-1], 1e-12)):
            names = names | {name}
    return sorted(names)


def test_a_change_of_one_weight_is_seen() -> None:
    """The negative control of the comparison that is used on other machines."""
    tensor = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    changed = tensor.clone()
    changed[7, 11] += 1e-2
    assert different({"w": project(tensor)}, {"w": project(tensor)}) == []
    assert different({"w": project(changed)}, {"w": project(tensor)}) == ["w"]
    assert different({}, {"w": project(tensor)}) == ["w"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true", help="run the commands in the current folder")
    parser.add_argument("--record", action="store_true", help="write same_as_before.json")
    arguments = parser.parse_args()
    if arguments.run:
        run_commands()
    if arguments.record:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(in_a_process_of_its_own(Path(folder)), indent=1)
        text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
        RECORDED.write_text(text + "\n", encoding="utf-8")
