"""Pools that measure jobs: in this process, or in several processes of this machine.

A pool takes groups of jobs and returns trials when they are finished, in any order. If a process dies, the pool measures its jobs again,
up to a number of attempts, and then returns them as failed. :mod:`regraft.search.ray_pool` is the pool for a Ray cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self, final

from regraft.errors import InputError, RegraftError, TrainingError
from regraft.plans import RankTrial
from regraft.progress import Say, say_nothing
from regraft.search.child import begin
from regraft.search.contract import Job, Measure, MeasureSpec

MAX_ATTEMPTS = 3
_PATIENCE_SECONDS = 1.0
Group = Sequence[Job]
"""Jobs that differ only in their ranks."""
Finished = list[tuple[Job, RankTrial]]


def measure_group(measure: Measure, jobs: Group) -> list[RankTrial]:
    """Measures jobs. A candidate that cannot be trained becomes a failed trial, so that the search continues.

    Raises:
        RegraftError: An error that all candidates have in common: in the data, the model or the disk.
    """
    try:
        trials = list(measure(jobs))
    except TrainingError as error:
        if len(jobs) > 1:  # at least one candidate is at fault: measure them one by one
            return [trial for job in jobs for trial in measure_group(measure, (job,))]
        return [jobs[0].failed(" ".join(str(error).split()))]
    assert [trial.ranks for trial in trials] == [job.ranks for job in jobs], "one trial for each job, in order"
    return trials


def died(jobs: Group, what: str) -> Finished:
    """Returns failed trials for jobs whose measuring process died too often."""
    return [(job, job.failed(f"{what} died {MAX_ATTEMPTS} times while measuring it (out of memory?)")) for job in jobs]


class Pool(AbstractContextManager["Pool"], ABC):
    """A pool of measuring processes; use it as a context manager, whose end stops the processes."""

    size: int

    @abstractmethod
    def busy(self) -> int:
        """Returns the number of groups that are being measured or are waiting."""

    @abstractmethod
    def start(self, jobs: Group) -> None:
        """Accepts a group of jobs that differ only in their ranks."""

    @abstractmethod
    def finished(self, timeout_seconds: float) -> Finished:
        """Waits until any job is finished and returns the finished jobs; returns none after the timeout.

        Raises:
            RegraftError: An error that all candidates have in common.
        """

    def __enter__(self) -> Self:
        return self


@final
class Inline(Pool):
    """A pool that measures in this process, one group after the other."""

    size = 1

    def __init__(self, spec: MeasureSpec) -> None:
        self._spec = spec
        self._measure: Measure | None = None
        self._waiting: list[Group] = []

    def busy(self) -> int:
        """Returns the number of waiting groups."""
        return len(self._waiting)

    def start(self, jobs: Group) -> None:
        """Puts a group into the queue."""
        self._waiting.append(jobs)

    def finished(self, timeout_seconds: float) -> Finished:
        """Measures the first group of the queue."""
        if not self._waiting:
            return []
        if self._measure is None:
            self._measure = self._spec.open()
        jobs = self._waiting.pop(0)
        return list(zip(jobs, measure_group(self._measure, jobs), strict=True))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._measure = None


@dataclass
class _Worker:
    """A measuring process of this machine.

    Attributes:
        process: The operating-system process.
        pipe: Pipe for groups to the process, and for trials or an error back.
        jobs: The group being measured; empty when the process is free.
        attempts: Number of attempts at the group, this one included.
    """

    process: BaseProcess
    pipe: Any
    jobs: Group = ()
    attempts: int = 0


@final
class Processes(Pool):
    """A pool of processes on this machine, which share its cores.

    Args:
        spec: Value that is opened once in each process.
        size: Number of processes.
        say: Called with a line for each process that dies.
    """

    def __init__(self, spec: MeasureSpec, size: int, say: Say = say_nothing) -> None:
        self.size = size
        self._say = say
        self._spec = spec
        self._waiting: list[tuple[Group, int]] = []
        self._workers: list[_Worker] = []

    def busy(self) -> int:
        """Returns the number of groups that are being measured or are waiting."""
        return len(self._waiting) + sum(bool(worker.jobs) for worker in self._workers)

    def start(self, jobs: Group) -> None:
        """Gives a group to a free process, or puts it into the queue."""
        self._waiting.append((jobs, 0))
        self._hand_out()

    def finished(self, timeout_seconds: float) -> Finished:
        """Waits for the first process that is finished or dead."""
        at_work: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers if worker.jobs}
        done: Finished = []
        for pipe in wait(list(at_work), timeout_seconds):
            done += self._collect(at_work[pipe])
        self._hand_out()
        return done

    def _hand_out(self) -> None:
        while self._waiting:
            free = next((worker for worker in self._workers if not worker.jobs), None)
            if free is None and len(self._workers) == self.size:
                return
            free = free or self._begin()
            free.jobs, attempts = self._waiting.pop(0)
            free.attempts = attempts + 1
            with suppress(OSError):  # the process is dead, which _collect will notice
                free.pipe.send(free.jobs)

    def _begin(self) -> _Worker:
        # Processes are spawned, because the threads of torch and of the heartbeat do not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // self.size)
        process = context.Process(target=begin, args=(theirs, threads, os.getpid()), name="regraft-worker", daemon=True)
        process.start()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        theirs.close()
        with suppress(OSError):  # the process is dead, which _collect will notice
            ours.send(self._spec)
        return worker

    def _collect(self, worker: _Worker) -> Finished:
        jobs, attempts = worker.jobs, worker.attempts
        try:
            answer: Any = worker.pipe.recv()
        except (EOFError, OSError):  # the pipe is closed, so the process is dead
            self._workers.remove(worker)
            self._end(worker)
            given_up = attempts >= MAX_ATTEMPTS
            how, then = _how(worker.process.exitcode), "counts as failed" if given_up else "is measured again by another"
            self._say(f"a measuring process died ({how}), at attempt {attempts} of {MAX_ATTEMPTS}; what it measured {then}")
            if given_up:
                return died(jobs, "the process")
            self._waiting.insert(0, (jobs, attempts))
            return []
        worker.jobs = ()
        if isinstance(answer, BaseException):
            raise answer
        return list(zip(jobs, answer, strict=True))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.terminate()
        worker.process.join(_PATIENCE_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _how(code: int | None) -> str:
    """Returns how a process ended, in words: the signal that ended it, or its exit code."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    return f"{name}, as where memory ran out" if name == "SIGKILL" else name


def serve(pipe: Connection, threads: int) -> None:
    """Measures the jobs that come through the pipe, after what measures them, until it closes; runs in a child process."""
    try:
        spec: MeasureSpec = pipe.recv()
    except (EOFError, OSError, KeyboardInterrupt):
        return
    measure: Measure | None = None
    while True:
        try:
            jobs: Group = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            measure = measure or spec.open(threads)
            answer: list[RankTrial] | RegraftError = measure_group(measure, jobs)
        except RegraftError as error:
            # Some of our errors have more arguments than their message, and cannot be unpickled.
            answer = InputError(str(error))
        except KeyboardInterrupt:
            return
        with suppress(OSError):
            pipe.send(answer)
