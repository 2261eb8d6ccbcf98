"""Choice of what measures the jobs of a search: this process, several processes of this machine, or a Ray cluster."""

from __future__ import annotations

from regraft.errors import InputError
from regraft.progress import Say
from regraft.search.contract import MeasureSpec
from regraft.search.pools import Inline, Pool, Processes
from regraft.search.ray_pool import RayPool, import_ray, refuse_nobody


def check_measurers(workers: int, ray: str | None) -> None:
    """Refuses a choice that cannot measure, before anything is computed.

    Args:
        workers: Number of measuring processes.
        ray: Address of a Ray cluster, or None.

    Raises:
        InputError: Both are chosen, or no cluster answers at the address.
        MissingDependencyError: Ray is not installed.
    """
    if ray is None:
        return
    import_ray()
    refuse_nobody(ray)
    if workers > 1:
        raise InputError(f"`workers={workers}` and `ray={ray}` both say who measures; leave one of them out")


def pool_of(spec: MeasureSpec, workers: int, ray: str | None, *, on_gpu: bool, say: Say) -> Pool:
    """Returns the pool that measures.

    Args:
        spec: Hashable value that is opened once in each measuring process.
        workers: Number of measuring processes of this machine; 1 is this process.
        ray: Address of a Ray cluster, or None.
        on_gpu: Whether a task of the cluster needs a GPU.
        say: Called with a line for each process that dies.
    """
    if ray is not None:
        return RayPool(spec, ray, gpus=1.0 if on_gpu else 0.0)
    return Processes(spec, workers, say) if workers > 1 else Inline(spec)
