"""Training in several processes, on one machine or many: who writes, who waits, and tensors that lie in shards.

Processes are started by ``accelerate launch``, ``torchrun`` or ``mpirun``, which tell each who it is in the environment. All of them
read the same files: the work folder must be on a file system that they share.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from regraft.errors import InputError

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def join_processes(device: torch.device) -> None:
    """Joins the other processes, if the launcher started any.

    Args:
        device: Where the model trains; a CPU uses gloo.

    Raises:
        InputError: The processes do not find one another, or the launcher was to start several and started one.
    """
    if dist.is_initialized():
        return
    if max(int(os.environ.get(name, "1")) for name in _COUNTS) < 2:
        _check_alone()
        return
    try:
        PartialState(cpu=device.type == "cpu", backend="gloo" if device.type == "cpu" else None)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the processes do not find one another ({reason}); check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE") from None


def _check_alone() -> None:
    """Refuses to be the one process that accelerate's launcher starts on CPUs, in silence, when it is asked for more without MPI.

    Raises:
        InputError: It is.
    """
    announced = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if announced and not any(name in os.environ for name in _COUNTS):
        raise InputError(
            "accelerate launch starts one process on CPUs, however many it is asked for, unless MPI starts them or --multi_gpu is given; "
            "use: accelerate launch --multi_gpu --num_processes 2 -m regraft ..., or torchrun --nproc-per-node 2 -m regraft ..."
        )


def local_device(name: str) -> str:
    """Returns the device of this process where its launcher gave it one of several GPUs, else what was asked for.

    >>> local_device("cpu")
    'cpu'
    """
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


def process_count() -> int:
    """Returns how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Returns which of them this is; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Returns whether this process is the one that writes."""
    return process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        dist.barrier()


def sum_over_processes(values: Iterable[float], device: torch.device) -> list[float]:
    """Returns the sums of some numbers over all processes, the same on each, added in float64."""
    numbers = torch.tensor(list(values), dtype=torch.float64, device=device)
    if process_count() > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def any_process(condition: bool, device: torch.device) -> bool:
    """Returns whether a condition holds in any process."""
    return sum_over_processes([float(condition)], device)[0] > 0 if process_count() > 1 else condition


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor in one piece; all processes must ask for the same ones in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_whole(target: Tensor, value: Tensor) -> None:
    """Copies a tensor in one piece into one that may lie in shards."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            moved = value.to(target.device, target.dtype)
            target.copy_(distribute_tensor(moved, target.device_mesh, target.placements))
        else:
            target.copy_(value)


def is_sharded(module: nn.Module) -> bool:
    """Returns whether parameters of a module lie in shards (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def skeleton_of(module: nn.Module) -> nn.Module:
    """Returns a copy of a module with its own buffers and with parameters that take no memory, for :func:`filled`.

    Sharding a model changes its classes and its parameters for good; what trains afterwards can be put into the copy.
    """
    memo: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad) for parameter in module.parameters()
    }
    return copy.deepcopy(module, cast("dict[int, object]", memo))


def filled(skeleton: nn.Module, sharded: nn.Module) -> nn.Module:
    """Puts the parameters of a sharded module, in one piece and on the CPU, into its copy from :func:`skeleton_of`."""
    values = {name: whole(parameter.detach()).cpu() for name, parameter in sharded.named_parameters()}
    skeleton.load_state_dict(values, strict=False, assign=True)
    for name, parameter in skeleton.named_parameters():
        assert not parameter.is_meta, name
    return skeleton
