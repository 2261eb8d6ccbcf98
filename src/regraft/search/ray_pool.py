"""Pool on a Ray cluster: each group of candidates is a task, which is repeated elsewhere if the worker or its machine dies.

Every machine needs regraft, and the model's folder and the data under the same paths. Only the process that runs the search writes to
the storage.
"""

from __future__ import annotations

import importlib
import socket
from functools import lru_cache
from types import TracebackType
from typing import Any, final

from regraft.errors import InputError, MissingDependencyError, RegraftError, shown
from regraft.plans import RankTrial
from regraft.search.contract import Measure, MeasureSpec
from regraft.search.pools import MAX_ATTEMPTS, Finished, Group, Pool, died, measure_group

_KNOCK_SECONDS = 5.0


@final
class RayPool(Pool):
    """A pool of the machines of a Ray cluster.

    Args:
        spec: Hashable value that is opened once in each worker of the cluster.
        address: ``auto`` for the cluster that this machine belongs to, or ``host:port``; ``local`` starts one on this machine.
        cpus: Number of CPUs for one task.
        gpus: Number of GPUs for one task.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: No cluster answers at the address.
    """

    def __init__(self, spec: MeasureSpec, address: str, *, cpus: float = 1.0, gpus: float = 0.0) -> None:
        self._ray = import_ray()
        self._began = not self._ray.is_initialized()
        if self._began:
            self._connect(address)
        self._spec = self._ray.put(spec)
        self._task = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_ATTEMPTS - 1)(_measure_remotely)
        self._running: dict[Any, Group] = {}
        resources = self._ray.cluster_resources()
        places = [resources.get("CPU", 1.0) / cpus] if cpus else []
        places += [resources.get("GPU", 0.0) / gpus] if gpus else []
        self.size = max(1, int(min(places, default=1.0)))

    def _connect(self, address: str) -> None:
        where: dict[str, Any] = {"address": address} if address != "local" else {"address": "local", "include_dashboard": False}
        refuse_nobody(address)
        try:
            self._ray.init(**where, logging_level="ERROR", log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise _nobody(address, error) from None

    def busy(self) -> int:
        """Returns the number of unfinished tasks."""
        return len(self._running)

    def start(self, jobs: Group) -> None:
        """Submits a group to the cluster."""
        self._running[self._task.remote(self._spec, jobs)] = jobs

    def finished(self, timeout_seconds: float) -> Finished:
        """Waits for the first task that is finished, or that Ray has given up."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_seconds) if self._running else ([], [])
        done: Finished = []
        for reference in ready:
            jobs = self._running.pop(reference)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError:
                raise  # an error in our own code, with the remote traceback
            except self._ray.exceptions.RayError:
                done += died(jobs, "the Ray worker")
                continue
            if isinstance(answer, str):
                raise InputError(answer)
            done += list(zip(jobs, answer, strict=True))
        return done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._began:
            self._ray.shutdown()


def refuse_nobody(address: str) -> None:
    """Refuses an address of a cluster that cannot be one or where nobody answers, because Ray itself would wait for minutes.

    Raises:
        InputError: It is neither ``local`` nor ``auto`` nor ``host:port``, or no program answers there.
    """
    if address in ("local", "auto") or "//" in address:
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port[:9]) < 2**16):
        raise _nobody(address, "an address is local, auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _nobody(address, error) from None


def _nobody(address: str, reason: object) -> InputError:
    why = shown(" ".join(str(reason).split()), 160)
    return InputError(
        f"no Ray cluster is at '{shown(address, 100)}' ({why}); begin one with `ray start --head`, or use `ray=local` or `workers`"
    )


def import_ray() -> Any:
    """Returns the module ``ray``.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingDependencyError("ray", "ray") from None


def _measure_remotely(spec: MeasureSpec, jobs: Group) -> list[RankTrial] | str:
    """Measures a group in a worker of the cluster; returns the message of an error that all candidates have in common."""
    try:
        return measure_group(_opened(spec), jobs)
    except RegraftError as error:
        return str(error)


@lru_cache(maxsize=2)
def _opened(spec: MeasureSpec) -> Measure:
    """Opens a spec, once in each worker process."""
    return spec.open()
