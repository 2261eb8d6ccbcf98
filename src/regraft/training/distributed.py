"""Training in several processes, on one or many machines: roles of the processes, and sharded tensors.

Processes are started by ``accelerate launch``, ``torchrun`` or ``mpirun``, which set the rank of each in its environment. All processes
read the same files, so that the work folder must be on a shared file system.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from regraft.errors import InputError, shown

T = TypeVar("T")
_OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "MASTER_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "DEEPSPEED_", "PMI_", "OMPI_", "MV2_")
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def join_processes(device: torch.device) -> None:
    """Joins the other processes, if the launcher started any.

    Args:
        device: Device of the training; a CPU uses gloo.

    Raises:
        InputError: The processes cannot connect, or the launcher was told to start several and started one.
    """
    if dist.is_initialized():
        return
    if max(_count(name) for name in _COUNTS) < 2:
        _check_alone()
        return
    try:
        PartialState(cpu=device.type == "cpu", backend="gloo" if device.type == "cpu" else None)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the processes do not find one another ({reason}); check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE") from None


def _check_alone() -> None:
    """Refuses to run as the single process that accelerate's launcher silently starts on CPUs without MPI, when told to start several.

    Raises:
        InputError: This is such a process.
    """
    announced = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if announced and not any(name in os.environ for name in _COUNTS):
        raise InputError(
            "accelerate starts one process on CPUs, however many it is asked for, unless MPI starts them; "
            "use `accelerate launch --multi_gpu --num_processes 2 -m regraft ...`, or `torchrun --nproc-per-node 2 -m regraft ...`"
        )


def in_surroundings(make: Callable[..., T], **given: Any) -> T:
    """Returns what a function makes that reads what a launcher left in the environment.

    Raises:
        InputError: There is something of a launcher in the environment, and it does not fit.
    """
    try:
        return make(**given)
    except (ValueError, TypeError, KeyError) as error:
        left = sorted(name for name in os.environ if name.startswith(_OF_LAUNCHERS))
        if not left:
            raise
        reason = shown((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise InputError(
            f"the environment has {shown(', '.join(left), 200)}, which does not fit ({reason}); unset what is not meant"
        ) from None


def local_device(name: str) -> str:
    """Returns the device of this process: the GPU that its launcher assigned, or else the requested device.

    >>> local_device("cpu")
    'cpu'
    """
    wanted = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{os.environ['LOCAL_RANK']}" if wanted and "LOCAL_RANK" in os.environ else name


def process_count() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Returns the rank of this process; rank 0 writes the files. Before the processes have met, the environment tells it."""
    if dist.is_initialized():
        return dist.get_rank()
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() and _count("WORLD_SIZE") > 1 else 0


def is_main() -> bool:
    """Returns whether this process writes the files."""
    return process_index() == 0


def wait_for_all() -> None:
    """Waits until every process has reached this call."""
    if process_count() > 1:
        dist.barrier()


def sum_over_processes(values: Iterable[float], device: torch.device) -> list[float]:
    """Returns the sums of numbers over all processes, equal on each, computed in float64."""
    numbers = torch.tensor(list(values), dtype=torch.float64, device=device)
    if process_count() > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def any_process(condition: bool, device: torch.device) -> bool:
    """Returns whether a condition holds in any process."""
    return sum_over_processes([float(condition)], device)[0] > 0 if process_count() > 1 else condition


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor gathered from its shards; all processes must gather the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_whole(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into one that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            moved = value.to(target.device, target.dtype)
            target.copy_(distribute_tensor(moved, target.device_mesh, target.placements))
        else:
            target.copy_(value)


def is_sharded(module: nn.Module) -> bool:
    """Returns whether parameters of a module are sharded (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def skeleton_of(module: nn.Module) -> nn.Module:
    """Returns a copy of a module with its own buffers and with parameters without memory, for :func:`filled`.

    Sharding permanently changes a model's classes and parameters; the trained parameters can be put into the copy.
    """
    memo: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad) for parameter in module.parameters()
    }
    return copy.deepcopy(module, cast("dict[int, object]", memo))


def filled(skeleton: nn.Module, sharded: nn.Module) -> nn.Module:
    """Copies the gathered parameters of a sharded module, on the CPU, into its copy from :func:`skeleton_of`."""
    values = {name: whole(parameter.detach()).cpu() for name, parameter in sharded.named_parameters()}
    skeleton.load_state_dict(values, strict=False, assign=True)
    for name, parameter in skeleton.named_parameters():
        assert not parameter.is_meta, name
    return skeleton


def _count(name: str) -> int:
    """Returns how many processes a variable of the environment speaks of; 1 where it is not set.

    Raises:
        InputError: It is no number.
    """
    value = os.environ.get(name, "1")
    if not (value.isascii() and value.isdigit() and len(value) < 8):
        raise InputError(f"the environment has {name}={shown(value, 60)}, which is no number of processes; unset it")
    return int(value)
