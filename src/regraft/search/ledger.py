"""The book of a search: which measurements are asked for, which are being made, and what came of them, one Optuna trial each.

Any number of processes and machines may write in one book. A job is posted as a waiting trial; whoever turns it to running, which the
database lets one of them do, measures it and writes the result. Jobs of those that died are posted again. If two post the same job,
the trial with the lower number counts.
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
from typing import Any, cast

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

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
_SIGNING_SECONDS = 0.05  # longer than another takes from reading a trial to signing it


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
    """The book of one search.

    Args:
        study: Its Optuna study, in ``storage``.
        storage: Where it is kept.
        space: Of the search.
        alone: Whether nobody else can be at work, because the search's folder is locked: then whatever is being measured was left
            behind by a process that died.
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
        """Turns the errors of the database inside the block into one line each."""
        with storage_errors(self._storage.shown):
            yield

    def results(self) -> list[tuple[Job, RankTrial]]:
        """Returns everything that was measured, in the order in which it was asked for, whoever was first to finish."""
        done = [(entry.job, entry.result) for entry in self._valid().values() if entry.result is not None]
        return sorted(done, key=lambda pair: pair[0].key)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Returns the jobs that are not measured yet."""
        valid = self._valid()
        return [job for job in jobs if job.key not in valid or valid[job.key].result is None]

    def post(self, jobs: Sequence[Job]) -> None:
        """Asks for jobs that nobody has asked for, or whose trial was lost.

        A job that kills one process after the other, on machines that share the book, is written down as failed. With one process at
        work nobody is left to do so, and whoever begins it again decides.
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
        """Takes up to ``count`` waiting jobs, which nobody else is given then; the first of them first."""
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
                cast(BaseHeartbeat, backend).record_heartbeat(entry.trial_id)
                with self._lock:
                    self._mine.add(entry.trial_id)
                taken.append(entry.job)
        return taken

    def _signed(self, entry: _Entry) -> bool:
        """Signs a trial that was claimed, and returns whether the signature stays.

        SQLite locks no rows: two processes that read a trial as waiting at the same moment may both have claimed it.
        """
        self._storage.backend.set_trial_user_attr(entry.trial_id, "worker", self._me)
        if self._alone:
            return True
        time.sleep(_SIGNING_SECONDS)
        return any(now.trial_id == entry.trial_id and now.worker == self._me for now in self._entries())

    def record(self, job: Job, result: RankTrial) -> None:
        """Writes a measurement down. When this returns it is on the disk.

        A database that is away for a moment is tried again a few times. What somebody else has measured meanwhile, because this
        process seemed dead, stays as they wrote it.
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
        backend.set_trial_user_attr(entry.trial_id, "loss_nats", result.loss_nats)  # last: with it, the measurement is made
        self._finish(entry, result)

    def _finish(self, entry: _Entry, result: RankTrial) -> None:
        if result.loss_nats is None:
            self._storage.backend.set_trial_state_values(entry.trial_id, TrialState.FAIL)
        else:
            self._storage.backend.set_trial_state_values(entry.trial_id, TrialState.COMPLETE, [result.loss_nats])

    def retire(self) -> None:
        """Ends the trials of those that died, so that their jobs can be posted again; a result that was written already is kept."""
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
        """Says, inside the block and now and then, that the jobs that this process has claimed are being worked on.

        Whoever leaves the block gives back what it has not measured.
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
            for trial_id in mine:
                # A database that is away now may be back for the next beat; if it is not, the next write will say so.
                with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
                    cast(BaseHeartbeat, backend).record_heartbeat(trial_id)
        backend.remove_session()

    def _release(self) -> None:
        """Gives back what this process has claimed and not measured, for the others."""
        with self._lock:
            mine = set(self._mine)
            self._mine.clear()
        for entry in self._entries():
            if entry.trial_id in mine and entry.state == TrialState.RUNNING:
                self._quietly(lambda entry=entry: self._drop(entry, GIVEN_BACK))

    def _entries(self) -> list[_Entry]:
        """Returns every trial of this search, in the order of their numbers."""
        found: list[_Entry] = []
        for trial in self.study.get_trials(deepcopy=False):
            job = job_of(trial, self.space)
            if job is not None:
                found.append(
                    _Entry(
                        number=trial.number,
                        trial_id=trial._trial_id,
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
        """Returns the trial that counts for every job: of those that were not dropped, the first."""
        valid: dict[Key, _Entry] = {}
        for entry in self._entries():
            if not entry.lost:
                valid.setdefault(entry.job.key, entry)
        return valid

    def _deaths(self) -> Counter[Key]:
        """Returns how often the process that measured a job died."""
        return Counter(entry.job.key for entry in self._entries() if entry.lost and entry.dropped not in (GIVEN_BACK, TWICE))

    def _is_dead(self, entry: _Entry) -> bool:
        """Returns whether the process of this machine that has claimed a trial is gone; of other machines only heartbeats tell."""
        if self._alone:
            return True
        if not entry.worker:  # it died between claiming the trial and signing it, before its first heartbeat
            return time.time() - entry.started > self._storage.grace_seconds
        host, pid, created = entry.worker.split("/")
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(int(pid)).create_time() != float(created)
        except psutil.NoSuchProcess:
            return True

    def _quietly(self, write: Callable[[], Any]) -> Any:
        """Writes to a trial, unless somebody else has finished it meanwhile."""
        try:
            return write()
        except UpdateFinishedTrialError:
            return None
