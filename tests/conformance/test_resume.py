"""A stage that is killed and given again, however often, ends with the bytes of one that was not disturbed, and leaves nothing else.

Whole runs of a recipe are in ``tests/pipelines/test_resume.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import kills
from regraft.cli.app import run
from tiny_inputs import make_inputs

TEXT = "--calibration INPUTS/text.txt --samples 4 --seq-len 16"
STEPS = "--data INPUTS/text.txt --batch 2 --seq-len 16 --held-out 0.2 --dropout 0.3"
SEARCH = "--ranks 1,2,3 --budget r=2 --trials 3 --samples 2 --confirm-seeds 2 --elastic 0 --prior none"
# The command; what must be among its files; what a kill must have left behind to go on from, in at least one of the moments.
STAGES: dict[str, tuple[str, str, str]] = {
    "prune": (f"prune INPUTS/model -o out --align 1 --criterion wanda --ratio 0.2 {TEXT}", "out/model.safetensors", ""),
    "prune streamed": (
        f"prune INPUTS/model -o out --align 1 --criterion wanda --select global --reconstruct least_squares --memory 2GB {TEXT}",
        "out/model.safetensors.index.json",
        "progress.json",
    ),
    "allocate": (f"allocate INPUTS/model -o plan.json --resume {SEARCH} --steps 4 {STEPS}", "plan.json", "search.db"),
    "recover": (
        f"recover INPUTS/model -o out --resume --no-merge --rank 2 --steps 8 --eval-every 2 {STEPS}",
        "out/adapter_model.safetensors",
        "checkpoint-",
    ),
    "export": ("export INPUTS/adapter --to merged -o out", "out/model.safetensors", ""),
    "compress": (f"compress INPUTS/model -o out --ratio 0.2 {TEXT}", "out/model.safetensors", ""),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and an adapter of the model."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_inputs()
        words = f"recover model -o adapter --no-merge --rank 2 --steps 1 --quiet {STEPS.replace('INPUTS/', '')}".split()
        assert run(words) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_anywhere_and_given_again_it_ends_with_the_same_bytes(inputs: Path, tmp_path: Path, stage: str) -> None:
    command, file, kept = STAGES[stage]
    files, stopped = kills.killed(command.replace("INPUTS", str(inputs)).split(), tmp_path, moments=2)
    assert file in files
    # Some were stopped with something done that the next went on from, and not all before they began.
    assert any(kept in name for name in stopped)
