"""Runs a search to its end: asks the sampler what is next, has it measured, and keeps every measurement before the next round.

The answer does not depend on how many processes measure, on who is first, or on how often the search was killed and resumed: what is
asked for next follows from whole rounds alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby

import optuna

from regraft.errors import StorageError
from regraft.plans import RankSpace, RankTrial
from regraft.search.contract import Job
from regraft.search.ledger import Ledger
from regraft.search.pools import Pool
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import Storage, quiet_optuna, storage_errors, together

_IDENTITY = "identity"
_POLL_SECONDS = 1.0

Told = Callable[[Job, RankTrial], None]


def open_ledger(storage: Storage, name: str, space: RankSpace, sampler: AllocatorSampler, identity: str, *, resume: bool) -> Ledger:
    """Opens the book of a search, or begins it.

    Args:
        storage: Where.
        name: Of the study; one store holds many.
        space: Of the search.
        sampler: Decides what comes next; also that of the study.
        identity: Whatever would change the result, as one line. A search goes on with the same only.
        resume: Go on with a search of this name; without, there must be none with trials.

    Raises:
        StorageError: There is a search of this name and ``resume`` is off, or it was begun with something else.
    """
    with storage_errors(storage.shown), quiet_optuna():
        study = together(
            lambda: optuna.create_study(
                storage=storage.backend, study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
            )
        )
        before = study.user_attrs.get(_IDENTITY)
        if before is None:
            study.set_user_attr(_IDENTITY, identity)
            study.set_metric_names(["held-out loss (nats)"])
        elif before != identity:
            raise StorageError(
                f"study '{name}' in storage {storage.shown} was begun with other settings, data or model; "
                "repeat its own to go on, or use another --storage"
            )
        elif not resume and study.get_trials(deepcopy=False):
            raise StorageError(f"storage {storage.shown} holds the search '{name}'; go on with --resume, or use another --storage")
        ledger = Ledger(study, storage, space, alone=not storage.shared)
        ledger.retire()
    return ledger


def search(ledger: Ledger, sampler: AllocatorSampler, pool: Pool, told: Told, at_once: int = 1) -> list[tuple[Job, RankTrial]]:
    """Measures until the schedule is through; returns everything that was measured, in order.

    Args:
        ledger: The book.
        sampler: Says what is next.
        pool: Measures.
        told: Called after each measurement that was made here, once it is on the disk.
        at_once: How many candidates one process trains in one pass.

    Raises:
        StorageError: The book cannot be read or written.
        RegraftError: Something is wrong with all candidates alike.
    """
    with ledger.errors(), ledger.alive():
        while (jobs := sampler.plan(ledger.study)) is not None:
            _carry_out(ledger, jobs, pool, told, at_once)
        return [pair for pair in ledger.results() if pair[0].phase == "search"]


def measure_all(ledger: Ledger, jobs: Sequence[Job], pool: Pool, told: Told, at_once: int = 1) -> list[RankTrial]:
    """Measures what of these jobs is not measured yet; returns the trials of all, in their order. Errors as :func:`search`."""
    with ledger.errors(), ledger.alive():
        _carry_out(ledger, jobs, pool, told, at_once)
        results = {job.key: trial for job, trial in ledger.results()}
        return [results[job.key] for job in jobs]


def _carry_out(ledger: Ledger, jobs: Sequence[Job], pool: Pool, told: Told, at_once: int) -> None:
    """Has jobs measured, here or by others who share the book."""
    while True:
        ledger.retire()
        missing = ledger.missing(jobs)
        if not missing and not pool.busy():
            return
        ledger.post(missing)
        free = pool.size - pool.busy()
        claimed = ledger.claim(missing, _wanted(missing, free, at_once)) if missing and free > 0 else []
        for group in _groups(claimed, at_once):
            pool.start(group)
        if pool.busy():
            for job, trial in pool.finished(_POLL_SECONDS):
                ledger.record(job, trial)
                told(job, trial)
        elif missing:
            time.sleep(_POLL_SECONDS)  # the rest is being measured elsewhere


def _wanted(missing: Sequence[Job], free: int, at_once: int) -> int:
    """Returns how many jobs to claim: scores by the elastic adapter all together, since whoever makes them trains it first."""
    return len(missing) if missing[0].kind == "elastic" else free * at_once


def _groups(jobs: Sequence[Job], at_once: int) -> list[tuple[Job, ...]]:
    """Returns the jobs in groups that can be measured in one pass."""
    found: list[tuple[Job, ...]] = []
    for (_, _, kind, _), alike in groupby(jobs, key=lambda job: (job.phase, job.fidelity, job.kind, job.seed)):
        together = tuple(alike)
        step = len(together) if kind == "elastic" else at_once
        found += [together[start : start + step] for start in range(0, len(together), step)]
    return found
