"""Ledger of a search: the posted jobs, who measures them, and the results, one Optuna trial each.

Any number of processes and machines may use one ledger. A job is posted as a waiting trial. A process claims it by setting it to running,
which the database allows only once, measures it and writes the result. Jobs of dead processes are posted again. If two processes post the
same job, the trial with the lower number is valid.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from regraft.compat import beat, trial_id
from regraft.errors import StorageError
from regraft.plans import RankSpace, RankTrial
from regraft.search.contract import Job, Key
from regraft.search.optuna_codec import attributes_of, distributions, is_lost, job_of, result_of
from regraft.search.storage import Storage, quiet_optuna, storage_errors

MAX_ATTEMPTS = 3
STOPPED = "whoever measured it died; it was asked for again"
GIVEN_BACK = "given back unmeasured"
TWICE = "asked for twice"
_WRITE_AGAIN_SECONDS = (0.5, 2.0, 8.0)
_SIGNING_SECONDS = 0.05  # longer than another process needs from reading a trial to signing it


@dataclass(frozen=True)
class _Entry:
    number: int
    trial_id: int
    state: TrialState
    job: Job
    result: RankTrial | None
    worker: str
    started: float
    lost: bool
    dropped: str


class Ledger:
    """The ledger of one search.

    Args:
        study: The search's Optuna study, in ``storage``.
        storage: Storage of the trials.
        space: Space of the search.
        alone: Whether this process has a lock on the search's folder. Then no other process is at work, and every running trial was left
            by a dead process.
    """

    def __init__(self, study: optuna.Study, storage: Storage, space: RankSpace, *, alone: bool) -> None:
        self.study = study
        self.space = space
        self._storage = storage
        self._alone = alone
        self._mine: set[int] = set()
        self._lock = threading.Lock()
        self._me = f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time()}"
        self._distributions = distributions(space)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors of the database inside the block into a StorageError of one line."""
        with storage_errors(self._storage.shown):
            yield

    def results(self) -> list[tuple[Job, RankTrial]]:
        """Returns all measurements in the order of their jobs, whatever the order in which they finished."""
        done = [(entry.job, entry.result) for entry in self._valid().values() if entry.result is not None]
        return sorted(done, key=lambda pair: pair[0].key)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Returns the jobs without a result."""
        valid = self._valid()
        return [job for job in jobs if job.key not in valid or valid[job.key].result is None]

    def post(self, jobs: Sequence[Job]) -> None:
        """Posts those jobs that have no valid trial: new ones, and ones whose process died.

        A job that killed several processes is recorded as failed if other processes share the ledger. With a single process, the user
        decides by starting the search again.
        """
        valid, deaths = self._valid(), self._deaths()
        for job in jobs:
            if job.key in valid:
                continue
            self._post(job, failed=not self._alone and deaths[job.key] >= MAX_ATTEMPTS)

    def _post(self, job: Job, *, failed: bool) -> None:
        given = attributes_of(job)
        if failed:
            given |= {"cost": 0.0, "note": f"the process that measured it died {MAX_ATTEMPTS} times (out of memory?)", "loss_nats": None}
        params = {slot.name: rank for slot, rank in zip(self.space.slots, job.ranks, strict=True)}
        state = TrialState.FAIL if failed else TrialState.WAITING
        self.study.add_trial(create_trial(state=state, params=params, distributions=self._distributions, user_attrs=given))

    def claim(self, jobs: Sequence[Job], count: int) -> list[Job]:
        """Claims up to ``count`` waiting jobs for this process, in order, so that no other process measures them."""
        wanted = {job.key for job in jobs}
        taken: list[Job] = []
        backend = self._storage.backend
        for entry in sorted(self._valid().values(), key=lambda entry: entry.job.key):
            if len(taken) == count:
                break
            if entry.state != TrialState.WAITING or entry.job.key not in wanted:
                continue
            if self._quietly(lambda entry=entry: backend.set_trial_state_values(entry.trial_id, TrialState.RUNNING)):
                if not self._signed(entry):
                    continue
                beat(backend, entry.trial_id)
                with self._lock:
                    self._mine.add(entry.trial_id)
                taken.append(entry.job)
        return taken

    def _signed(self, entry: _Entry) -> bool:
        """Signs a claimed trial, and returns whether this process still owns it after a short wait.

        SQLite has no row locks: two processes that read a trial as waiting at the same moment may both have claimed it.
        """
        self._storage.backend.set_trial_user_attr(entry.trial_id, "worker", self._me)
        if self._alone:
            return True
        time.sleep(_SIGNING_SECONDS)
        return any(now.trial_id == entry.trial_id and now.worker == self._me for now in self._entries())

    def record(self, job: Job, result: RankTrial) -> None:
        """Stores a measurement. It is on disk when this returns.

        If the database is unreachable for a moment, the write is repeated a few times. If another process has meanwhile measured the job,
        because this process seemed dead, that result is kept.
        """
        entry = self._valid().get(job.key)
        if entry is None or entry.state != TrialState.RUNNING:
            return
        for pause in (*_WRITE_AGAIN_SECONDS, None):
            try:
                with self.errors():
                    self._quietly(lambda: self._write(entry, result))
                break
            except StorageError as error:
                if pause is None or not isinstance(error.__cause__, SQLAlchemyError | optuna.exceptions.StorageInternalError):
                    raise
                time.sleep(pause)
        with self._lock:
            self._mine.discard(entry.trial_id)

    def _write(self, entry: _Entry, result: RankTrial) -> None:
        backend = self._storage.backend
        backend.set_trial_user_attr(entry.trial_id, "cost", result.cost)
        backend.set_trial_user_attr(entry.trial_id, "note", result.note)
        backend.set_trial_user_attr(entry.trial_id, "loss_nats", result.loss_nats)  # last, because it marks the result as complete
        self._finish(entry, result)

    def _finish(self, entry: _Entry, result: RankTrial) -> None:
        if result.loss_nats is None:
            self._storage.backend.set_trial_state_values(entry.trial_id, TrialState.FAIL)
        else:
            self._storage.backend.set_trial_state_values(entry.trial_id, TrialState.COMPLETE, [result.loss_nats])

    def retire(self) -> None:
        """Ends the trials of dead processes, so that their jobs can be posted again; results already written are kept."""
        for entry in self._entries():
            if entry.state != TrialState.RUNNING or entry.trial_id in self._mine:
                continue
            if self._is_dead(entry):
                self._quietly(lambda entry=entry: self._finish(entry, entry.result) if entry.result else self._drop(entry, STOPPED))
        if self._storage.shared:
            with quiet_optuna():
                fail_stale_trials(self.study)
        self._drop_doubles()

    def _drop_doubles(self) -> None:
        valid = {entry.trial_id for entry in self._valid().values()}
        for entry in self._entries():
            if entry.state == TrialState.WAITING and entry.trial_id not in valid:
                self._quietly(lambda entry=entry: self._drop(entry, TWICE))

    def _drop(self, entry: _Entry, note: str) -> None:
        self._storage.backend.set_trial_user_attr(entry.trial_id, "dropped", note)
        self._storage.backend.set_trial_state_values(entry.trial_id, TrialState.FAIL)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Sends heartbeats, inside the block, for the jobs that this process has claimed.

        At the end of the block, claimed jobs without a result are given back.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), name="regraft-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with suppress(StorageError, SQLAlchemyError, optuna.exceptions.StorageInternalError):
                self._release()
                self._storage.close()

    def _beat(self, stop: threading.Event) -> None:
        backend = self._storage.backend
        while not stop.wait(self._storage.heartbeat_seconds):
            with self._lock:
                mine = sorted(self._mine)
            for mine_id in mine:
                # An unreachable database may be back at the next heartbeat; otherwise the next write raises the error.
                with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
                    beat(backend, mine_id)
        backend.remove_session()

    def _release(self) -> None:
        """Gives back the jobs that this process has claimed and not measured, so that others can claim them."""
        with self._lock:
            mine = set(self._mine)
            self._mine.clear()
        for entry in self._entries():
            if entry.trial_id in mine and entry.state == TrialState.RUNNING:
                self._quietly(lambda entry=entry: self._drop(entry, GIVEN_BACK))

    def _entries(self) -> list[_Entry]:
        """Returns all trials of this search, in the order of their numbers."""
        found: list[_Entry] = []
        for trial in self.study.get_trials(deepcopy=False):
            job = job_of(trial, self.space)
            if job is not None:
                found.append(
                    _Entry(
                        number=trial.number,
                        trial_id=trial_id(trial),
                        state=trial.state,
                        job=job,
                        result=result_of(trial, job),
                        worker=trial.user_attrs.get("worker", ""),
                        started=trial.datetime_start.timestamp() if trial.datetime_start is not None else 0.0,
                        lost=is_lost(trial),
                        dropped=trial.user_attrs.get("dropped", ""),
                    )
                )
        return sorted(found, key=lambda entry: entry.number)

    def _valid(self) -> dict[Key, _Entry]:
        """Returns the valid trial of every job: the first one that was not dropped."""
        valid: dict[Key, _Entry] = {}
        for entry in self._entries():
            if not entry.lost:
                valid.setdefault(entry.job.key, entry)
        return valid

    def _deaths(self) -> Counter[Key]:
        """Returns for each job how often its measuring process died."""
        return Counter(entry.job.key for entry in self._entries() if entry.lost and entry.dropped not in (GIVEN_BACK, TWICE))

    def _is_dead(self, entry: _Entry) -> bool:
        """Returns whether a trial's process on this machine is dead. For other machines, missing heartbeats decide (see :meth:`retire`)."""
        if self._alone:
            return True
        if not entry.worker:  # the process claimed the trial but did not sign it; it may have died before its first heartbeat
            return time.time() - entry.started > self._storage.grace_seconds
        host, pid, created = entry.worker.split("/")
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(int(pid)).create_time() != float(created)
        except psutil.NoSuchProcess:
            return True

    def _quietly(self, write: Callable[[], Any]) -> Any:
        """Writes to a trial, unless another process has finished it meanwhile."""
        try:
            return write()
        except UpdateFinishedTrialError:
            return None
