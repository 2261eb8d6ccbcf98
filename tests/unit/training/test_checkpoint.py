from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft.errors import OutputError, TrainingError
from regraft.training import checkpoint as module
from regraft.training.checkpoint import (
    Checkpoint,
    checkpoints,
    put_tensors,
    read_checkpoint,
    trained_tensors,
    write_checkpoint,
)


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save_state(path: str) -> None:
    Path(path).write_text("{}")


def write(work: Path, step: int) -> Path:
    model, optimizer = trained(step)
    tensors = trained_tensors(model)
    return write_checkpoint(work, Checkpoint(step, tensors, tensors, optimizer.state_dict(), {"best_step": 1}, {}), save_state)


def test_an_optimizer_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    undisturbed, _ = trained(5)
    model, _ = trained(0)
    read = read_checkpoint(path)
    assert read.step == 3
    assert read.progress == {"best_step": 1}
    assert sorted(read.trained) == ["0.bias", "1.bias", "1.weight"]
    put_tensors(model, read.trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=7.0)
    optimizer.load_state_dict(dict(read.optimizer))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_only_safetensors_and_json_are_written_and_only_the_last_is_kept(tmp_path: Path) -> None:
    for step in (5, 10, 110):
        write(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-110"]
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        Path(path).write_bytes(b"part")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write(tmp_path, 10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]
    assert read_checkpoint(tmp_path / "checkpoint-5").step == 5


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str) -> None:
    path = write(tmp_path, 5)
    (path / file).write_bytes((path / file).read_bytes()[:20])
    with pytest.raises(TrainingError, match=r"checkpoint '.*checkpoint-5' is damaged .* remove"):
        read_checkpoint(path)
    (path / file).unlink()
    with pytest.raises(TrainingError, match="is damaged"):
        read_checkpoint(path)


def test_tensors_of_another_adapter_are_refused(tmp_path: Path) -> None:
    model, _ = trained(1)
    tensors = trained_tensors(model)
    with pytest.raises(TrainingError, match="do not fit"):
        put_tensors(model, {name: value[:1] for name, value in tensors.items()})
    with pytest.raises(TrainingError, match="do not fit"):
        put_tensors(model, {"0.bias": tensors["0.bias"]})


def test_progress_is_readable(tmp_path: Path) -> None:
    values = json.loads((write(tmp_path, 2) / "progress.json").read_text())
    assert values["param_groups"][0]["lr"] == 0.1
