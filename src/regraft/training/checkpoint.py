"""Checkpoints of a training run, in safetensors and JSON; each is either complete or absent.

A checkpoint is a folder ``checkpoint-STEP`` with the trained tensors, the best tensors so far, the optimizer's tensors, and two
JSON files. No state of random generators is stored, because the data order and dropout depend only on the seed and the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from regraft.atomic import atomic_folder
from regraft.errors import TrainingError, shown
from regraft.reading import read_object
from regraft.training.distributed import put_whole, whole

TRAINER_STATE = "trainer_state.json"
"""Name of the file from which the Trainer restores its own state."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """State of a training run, complete enough to resume it with identical results.

    Attributes:
        step: Number of optimizer steps made.
        trained: The trained parameters by name, after that step.
        best: The trained parameters at the step with the lowest held-out loss so far.
        optimizer: The state dict of the optimizer.
        progress: JSON values: the schedule, the log, the best step, and the identity of the run.
        adapter: State of the adapter other than parameters.
    """

    step: int
    trained: Tensors
    best: Tensors
    optimizer: Mapping[str, Any]
    progress: Mapping[str, Any]
    adapter: Tensors


def write_checkpoint(work: Path, checkpoint: Checkpoint, save_trainer_state: Callable[[str], None]) -> Path:
    """Writes a checkpoint and then removes the earlier ones.

    Args:
        work: Folder of all checkpoints of one run.
        checkpoint: The checkpoint to write.
        save_trainer_state: Writes the Trainer's state to a given path.

    Raises:
        OutputError: The checkpoint cannot be written, for example on a full disk; the previous one is kept.
    """
    path = work / f"checkpoint-{checkpoint.step}"
    groups = checkpoint.optimizer["param_groups"]
    flat = {
        f"{index}.{name}": value.contiguous() for index, state in checkpoint.optimizer["state"].items() for name, value in state.items()
    }
    with atomic_folder(path, replace=True) as partial:
        save_file(dict(checkpoint.trained), partial / "trained.safetensors")
        save_file(dict(checkpoint.best), partial / "best.safetensors")
        save_file(flat, partial / "optimizer.safetensors")
        save_file({name: value.to("cpu").contiguous() for name, value in checkpoint.adapter.items()}, partial / "adapter.safetensors")
        save_trainer_state(str(partial / TRAINER_STATE))
        text = json.dumps({"param_groups": groups, **checkpoint.progress}, indent=1)
        (partial / "progress.json").write_text(text, encoding="utf-8")
    for older in checkpoints(work):
        if older != path:
            shutil.rmtree(older)
    return path


def checkpoints(work: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, the latest last."""
    found = [entry for entry in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", entry.name)]
    return sorted(found, key=lambda entry: int(entry.name.rpartition("-")[2]))


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        TrainingError: The checkpoint is damaged.
    """
    try:
        progress = read_object(path / "progress.json", TrainingError)
        tensors = {name: load_file(path / f"{name}.safetensors") for name in ("trained", "best", "optimizer", "adapter")}
        groups = progress.pop("param_groups")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        for group in groups:  # JSON has no tuples
            group.update({name: tuple(value) for name, value in group.items() if name == "betas"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, TrainingError) as error:
        raise TrainingError(f"checkpoint '{path}' is damaged ({shown(error, 200)}); remove '{path.parent}' and train again") from None
    return Checkpoint(
        step=int(path.name.rpartition("-")[2]),
        trained=tensors["trained"],
        best=tensors["best"],
        optimizer={"state": state, "param_groups": groups},
        progress=progress,
        adapter=tensors["adapter"],
    )


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns a CPU copy of every trained parameter by name, gathered from shards; all processes must call this together."""
    return {
        name: whole(parameter.detach()).to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put_tensors(model: torch.nn.Module, tensors: Tensors) -> None:
    """Copies tensors into the trained parameters of the same names.

    Raises:
        TrainingError: Names or shapes differ from the model's trained parameters.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {name: value.shape for name, value in trained.items()} != {name: value.shape for name, value in tensors.items()}:
        raise TrainingError("the checkpoint's tensors do not fit the adapter; remove the checkpoints and train again")
    for name, parameter in trained.items():
        put_whole(parameter.data, tensors[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state dict of an optimizer with tensors gathered from shards; all processes must call this together."""
    state: dict[str, Any] = optimizer.state_dict()
    pieces = {
        index: {name: whole(value.detach()).to("cpu", copy=True) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": pieces, "param_groups": state["param_groups"]}


def put_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restores a state from :func:`optimizer_state`, split into the shards of its parameters."""
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    pieces = {index: {name: _like(parameters[index], value) for name, value in entry.items()} for index, entry in state["state"].items()}
    optimizer.load_state_dict({"state": pieces, "param_groups": state["param_groups"]})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
