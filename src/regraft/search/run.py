"""Loop of a search: the sampler gives the next jobs, a pool measures them, and every result is stored before the next round.

The result does not depend on the number of processes, on the order in which they finish, or on how often the search was killed and
resumed, because the next jobs are computed from complete rounds only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import optuna

from regraft.errors import StorageError
from regraft.plans import RankSpace, RankTrial
from regraft.search.contract import Job
from regraft.search.leases import Leases
from regraft.search.pools import Pool
from regraft.search.postings import Postings
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import Storage, check_readable, quiet_optuna, storage_errors, together

_IDENTITY = "identity"
_POLL_SECONDS = 1.0

Told = Callable[[Job, RankTrial], None]


@dataclass(frozen=True)
class OpenSearch:
    """A search whose study is open.

    Attributes:
        postings: Its jobs and results.
        leases: The jobs that this process measures.
        storage: Storage of both.
    """

    postings: Postings
    leases: Leases
    storage: Storage


def open_search(storage: Storage, name: str, space: RankSpace, sampler: AllocatorSampler, identity: str, *, resume: bool) -> OpenSearch:
    """Opens a search, or creates it.

    Args:
        storage: Storage of the trials.
        name: Name of the study; one storage may hold many studies.
        space: Space of the search.
        sampler: Sampler of the study, which decides the next jobs.
        identity: All inputs that would change the result, as one line. A search can only be resumed with the same identity.
        resume: Whether to continue a search of this name. If False, no search of this name may have trials.

    Raises:
        StorageError: A search of this name exists and ``resume`` is False, or it was begun with another identity.
    """
    with storage_errors(storage.shown), quiet_optuna():
        study = together(
            lambda: optuna.create_study(
                storage=storage.backend, study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
            )
        )
        check_readable(study, storage.shown)
        before = study.user_attrs.get(_IDENTITY)
        if before is None:
            study.set_user_attr(_IDENTITY, identity)
            study.set_metric_names(["held-out loss (nats)"])
        elif before != identity:
            raise StorageError(
                f"study '{name}' in storage {storage.shown} was begun with other settings, data or model; "
                "repeat its own to go on, or use another `storage`"
            )
        elif not resume and study.get_trials(deepcopy=False):
            raise StorageError(f"storage {storage.shown} holds the search '{name}'; go on with `resume`, or use another `storage`")
        postings = Postings(study, space)
        leases = Leases(postings, storage, alone=not storage.shared)
        leases.retire()
    return OpenSearch(postings, leases, storage)


def search(opened: OpenSearch, sampler: AllocatorSampler, pool: Pool, told: Told, at_once: int = 1) -> list[tuple[Job, RankTrial]]:
    """Measures until the schedule is finished; returns all measurements of the search, in order.

    Args:
        opened: The search.
        sampler: Sampler that gives the next jobs.
        pool: Pool that measures.
        told: Called after each measurement of this process, once it is on disk.
        at_once: Number of candidates that one process trains in one pass.

    Raises:
        StorageError: The storage cannot be read or written.
        RegraftError: An error that all candidates have in common.
    """
    with storage_errors(opened.storage.shown), opened.leases.kept():
        while (jobs := sampler.plan(opened.postings.study)) is not None:
            _measure(opened, jobs, pool, told, at_once)
        return [pair for pair in opened.postings.results() if pair[0].phase == "search"]


def measure_all(opened: OpenSearch, jobs: Sequence[Job], pool: Pool, told: Told, at_once: int = 1) -> list[RankTrial]:
    """Measures those of the jobs that have no result yet; returns the trials of all jobs, in order. Errors are as in :func:`search`."""
    with storage_errors(opened.storage.shown), opened.leases.kept():
        _measure(opened, jobs, pool, told, at_once)
        results = {job.key: trial for job, trial in opened.postings.results()}
        return [results[job.key] for job in jobs]


def _measure(opened: OpenSearch, jobs: Sequence[Job], pool: Pool, told: Told, at_once: int) -> None:
    """Waits until all jobs are measured, by this process or by others that share the storage."""
    while True:
        opened.leases.retire()
        missing = opened.postings.missing(jobs)
        if not missing and not pool.busy():
            return
        opened.postings.post(missing, give_up=not opened.leases.alone)
        free = pool.size - pool.busy()
        taken = opened.leases.take(missing, _wanted(missing, free, at_once)) if missing and free > 0 else []
        for group in _groups(taken, at_once):
            pool.start(group)
        if pool.busy():
            for job, trial in pool.finished(_POLL_SECONDS):
                opened.leases.record(job, trial)
                told(job, trial)
        elif missing:
            time.sleep(_POLL_SECONDS)  # other processes measure the remaining jobs


def _wanted(missing: Sequence[Job], free: int, at_once: int) -> int:
    """Returns how many jobs to take. Elastic scores are taken all together, because their process must train the adapter first."""
    return len(missing) if missing[0].kind == "elastic" else free * at_once


def _groups(jobs: Sequence[Job], at_once: int) -> list[tuple[Job, ...]]:
    """Returns the jobs in groups that can be measured in one pass."""
    found: list[tuple[Job, ...]] = []
    for (_, _, kind, _), alike in groupby(jobs, key=lambda job: (job.phase, job.fidelity, job.kind, job.seed)):
        together = tuple(alike)
        step = len(together) if kind == "elastic" else at_once
        found += [together[start : start + step] for start in range(0, len(together), step)]
    return found
