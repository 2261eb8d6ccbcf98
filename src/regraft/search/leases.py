"""Leases of a search: which process measures which posted job, and what becomes of the jobs of dead processes.

A process takes a job by setting its trial to running, which the database allows only once, signs it, and sends heartbeats while it
measures. Jobs of dead processes are posted again.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from regraft.compat import beat
from regraft.errors import StorageError
from regraft.plans import RankTrial
from regraft.search.contract import Job
from regraft.search.postings import GIVEN_BACK, Posting, Postings
from regraft.search.storage import Storage, quiet_optuna, storage_errors

_DIED = "whoever measured it died; it was asked for again"
_WRITE_AGAIN_SECONDS = (0.5, 2.0, 8.0)
# How long to wait after signing a trial: longer than another process needs from reading it to signing it. On a loaded machine that takes
# long, for this process as for the other, so that the wait is also a multiple of the time that this process needed.
_SIGNING_SECONDS = 0.05
_SIGNING_TIMES = 4


class Leases:
    """The jobs that this process measures.

    Args:
        postings: Jobs and results of the search.
        storage: Storage that they are in.
        alone: Whether this process has a lock on the search's folder. Then no other process is at work, and every running trial was left
            by a dead process.
    """

    def __init__(self, postings: Postings, storage: Storage, *, alone: bool) -> None:
        self.alone = alone
        self._postings = postings
        self._storage = storage
        self._mine: set[int] = set()
        self._lock = threading.Lock()
        self._me = f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time()}"

    def take(self, jobs: Sequence[Job], count: int) -> list[Job]:
        """Takes up to ``count`` waiting jobs for this process, in order, so that no other process measures them."""
        wanted = {job.key for job in jobs}
        taken: list[Job] = []
        for posting in sorted(self._postings.valid().values(), key=lambda posting: posting.job.key):
            if len(taken) == count:
                break
            if posting.state != TrialState.WAITING or posting.job.key not in wanted:
                continue
            if self._started(posting):
                beat(self._storage.backend, posting.trial_id)
                with self._lock:
                    self._mine.add(posting.trial_id)
                taken.append(posting.job)
        return taken

    def _started(self, posting: Posting) -> bool:
        """Sets a waiting trial to running and signs it; returns whether it is still this process's after a short wait.

        SQLite has no row locks: two processes that read a trial as waiting at the same moment may both have set it to running.
        """
        begun = time.monotonic()
        if not self._postings.start(posting):
            return False
        self._postings.sign(posting, self._me)
        if self.alone:
            return True
        time.sleep(max(_SIGNING_SECONDS, _SIGNING_TIMES * (time.monotonic() - begun)))
        return any(now.trial_id == posting.trial_id and now.worker == self._me for now in self._postings.all())

    def record(self, job: Job, result: RankTrial) -> None:
        """Stores the measurement of a job and ends its lease.

        If the database is unreachable for a moment, the write is repeated a few times. If another process has meanwhile measured the job,
        because this process seemed dead, that result is kept.
        """
        posting = self._postings.valid().get(job.key)
        if posting is None or posting.state != TrialState.RUNNING:
            return
        for pause in (*_WRITE_AGAIN_SECONDS, None):
            try:
                with storage_errors(self._storage.shown):
                    self._postings.write(posting, result)
                break
            except StorageError as error:
                if pause is None or not isinstance(error.__cause__, SQLAlchemyError | StorageInternalError):
                    raise
                time.sleep(pause)
        with self._lock:
            self._mine.discard(posting.trial_id)

    def retire(self) -> None:
        """Ends the trials of dead processes, so that their jobs can be posted again; results already written are kept."""
        for posting in self._postings.all():
            if posting.state != TrialState.RUNNING or posting.trial_id in self._mine or not self._is_dead(posting):
                continue
            if posting.result is not None:
                self._postings.finish(posting, posting.result)
            else:
                self._postings.drop(posting, _DIED)
        if self._storage.shared:
            with quiet_optuna():
                fail_stale_trials(self._postings.study)
        self._postings.drop_doubles()

    def _is_dead(self, posting: Posting) -> bool:
        """Returns whether a trial's process on this machine is dead. For other machines, missing heartbeats decide (see :meth:`retire`)."""
        if self.alone:
            return True
        if not posting.worker:  # the process took the trial but did not sign it; it may have died before its first heartbeat
            return time.time() - posting.started > self._storage.grace_seconds
        host, pid, created = posting.worker.split("/")
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(int(pid)).create_time() != float(created)
        except psutil.NoSuchProcess:
            return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Sends heartbeats, inside the block, for the jobs of this process. At the end, jobs without a result are given back."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), name="regraft-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with suppress(StorageError, SQLAlchemyError, StorageInternalError):
                self._give_back()
                self._storage.close()

    def _beat(self, stop: threading.Event) -> None:
        backend = self._storage.backend
        while not stop.wait(self._storage.heartbeat_seconds):
            with self._lock:
                mine = sorted(self._mine)
            for mine_id in mine:
                # An unreachable database may be back at the next heartbeat; otherwise the next write raises the error.
                with suppress(SQLAlchemyError, StorageInternalError):
                    beat(backend, mine_id)
        backend.remove_session()

    def _give_back(self) -> None:
        """Drops the jobs that this process has taken and not measured, so that others can take them."""
        with self._lock:
            mine = set(self._mine)
            self._mine.clear()
        for posting in self._postings.all():
            if posting.trial_id in mine and posting.state == TrialState.RUNNING:
                self._postings.drop(posting, GIVEN_BACK)
