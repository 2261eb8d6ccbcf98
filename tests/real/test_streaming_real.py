"""Streamed pruning of a real model: the units and the weights that pruning in memory gives, and a bound that holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from choices import assert_same_choice
from regraft.pipelines.prune.prune import prune
from regraft.settings import PruneSettings

SHARED = Path(__file__).parents[3] / "shared"
MODEL = SHARED / "models" / "stories3M"
STORIES = SHARED / "data" / "tinystories" / "train.txt"

pytestmark = pytest.mark.skipif(not STORIES.is_file(), reason="needs ../shared with models and texts, which only developers have")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "memory"),
    [
        ({"criterion": "taylor"}, "100MB"),
        ({"criterion": "taylor", "order": "mixed", "shape": "uniform", "select": "uniform", "reconstruct": "none"}, "2GB"),
        ({"criterion": "flap"}, "2GB"),
        ({"criterion": "surgeon", "ratio": 0.3}, "2GB"),
    ],
    ids=["taylor", "mixed-uniform", "flap", "surgeon"],
)
def test_it_is_the_model_that_memory_gives(tmp_path: Path, given: dict[str, object], memory: str) -> None:
    usual = {"calibration": STORIES, "samples": 24, "seq_len": 64, "select": "global", "shape": "per-layer", "reconstruct": "least_squares"}
    plain = prune(MODEL, tmp_path / "plain", PruneSettings.model_validate(usual | given))
    streamed = prune(MODEL, tmp_path / "streamed", PruneSettings.model_validate(usual | given | {"memory": memory}))
    assert_same_choice(streamed.plan, plain.plan)
    got, want = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "plain")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()), msg=name)


@pytest.mark.long
def test_what_is_written_generates_what_memory_generates(tmp_path: Path) -> None:
    asked = PruneSettings(
        criterion="taylor", calibration=STORIES, samples=16, seq_len=64, select="global", reconstruct="least_squares", shape="per-layer"
    )
    plain = prune(MODEL, None, asked).model
    prune(MODEL, tmp_path / "streamed", asked.model_copy(update={"memory": 2_000_000_000}))
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert plain is not None
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(streamed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    """A process that is killed while it writes leaves shards behind, and the same command ends with the same bytes."""
    script = """
import os, signal, sys
from regraft.cli import app
from regraft.streaming import output, writer
output.SHARD_BYTES = 1 << 21
if sys.argv[1] == "die":
    put, count = output.PartialOutput.add, 0
    def add(self, shard, sha256):
        global count
        put(self, shard, sha256)
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    output.PartialOutput.add = add
sys.argv[0] = "regraft"
sys.exit(app.run(sys.argv[2:]))
"""
    usual = ["prune", str(MODEL), "--criterion", "taylor", "--shape", "per-layer", "--memory", "2GB", "--samples", "16", "--seq-len", "64"]
    usual += ["--calibration", str(STORIES), "--output"]

    def attempt(how: str, output: Path) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", script, how, *usual, str(output)]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert attempt("live", tmp_path / "through") == 0
    assert attempt("die", tmp_path / "out") == -9
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.regraft" / "new").glob("*.safetensors"))) == 3
    assert attempt("live", tmp_path / "out") == 0
    assert not (tmp_path / ".out.regraft").exists()
    for path in sorted((tmp_path / "through").glob("*.safetensors")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
