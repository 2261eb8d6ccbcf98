"""Postings of a search: its jobs and their results, one Optuna trial each.

Any number of processes and machines may post and read. A job is posted as a waiting trial. If two processes post the same job, the trial
with the lower number is valid. Who measures a job is the affair of :mod:`regraft.search.leases`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial

from regraft.compat import storage_of, trial_id
from regraft.plans import RankSpace, RankTrial
from regraft.search.contract import Job, Key
from regraft.search.optuna_codec import attributes_of, distributions, is_lost, job_of, result_of

MAX_ATTEMPTS = 3
GIVEN_BACK = "given back unmeasured"
_TWICE = "asked for twice"


@dataclass(frozen=True)
class Posting:
    """One trial of a job.

    Attributes:
        number: Number in the study.
        trial_id: Name of the trial in its storage.
        state: Waiting, running, complete or failed.
        job: The job.
        result: The measurement; None without one.
        worker: Who measures it: host, process id and its start, or empty.
        started: Time at which it began to run, in seconds since 1970; 0 if it has not.
        lost: Whether it ended without a measurement.
        dropped: Reason for which it was dropped, or empty.
    """

    number: int
    trial_id: int
    state: TrialState
    job: Job
    result: RankTrial | None
    worker: str
    started: float
    lost: bool
    dropped: str


class Postings:
    """The jobs and results of one search.

    Args:
        study: The search's Optuna study.
        space: Space of the search.
    """

    def __init__(self, study: optuna.Study, space: RankSpace) -> None:
        self.study = study
        self._space = space
        self._backend = storage_of(study)
        self._distributions = distributions(space)

    def all(self) -> list[Posting]:
        """Returns all trials of this search, in the order of their numbers; those that other programs added are left out."""
        found: list[Posting] = []
        for trial in self.study.get_trials(deepcopy=False):
            job = job_of(trial, self._space)
            if job is not None:
                found.append(
                    Posting(
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
        return sorted(found, key=lambda posting: posting.number)

    def valid(self) -> dict[Key, Posting]:
        """Returns the valid trial of every job: the first one that was not dropped."""
        valid: dict[Key, Posting] = {}
        for posting in self.all():
            if not posting.lost:
                valid.setdefault(posting.job.key, posting)
        return valid

    def results(self) -> list[tuple[Job, RankTrial]]:
        """Returns all measurements in the order of their jobs, whatever the order in which they finished."""
        done = [(posting.job, posting.result) for posting in self.valid().values() if posting.result is not None]
        return sorted(done, key=lambda pair: pair[0].key)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Returns the jobs without a result."""
        valid = self.valid()
        return [job for job in jobs if job.key not in valid or valid[job.key].result is None]

    def post(self, jobs: Sequence[Job], *, give_up: bool) -> None:
        """Posts those jobs that have no valid trial: new ones, and ones whose process died.

        Args:
            jobs: The jobs.
            give_up: Whether a job that killed several processes is recorded as failed. With a single process, the user decides by
                starting the search again.
        """
        valid, deaths = self.valid(), self._deaths()
        for job in jobs:
            if job.key not in valid:
                self._post(job, failed=give_up and deaths[job.key] >= MAX_ATTEMPTS)

    def _post(self, job: Job, *, failed: bool) -> None:
        given = attributes_of(job)
        if failed:
            given |= {"cost": 0.0, "note": f"the process that measured it died {MAX_ATTEMPTS} times (out of memory?)", "loss_nats": None}
        params = {slot.name: rank for slot, rank in zip(self._space.slots, job.ranks, strict=True)}
        state = TrialState.FAIL if failed else TrialState.WAITING
        self.study.add_trial(create_trial(state=state, params=params, distributions=self._distributions, user_attrs=given))

    def _deaths(self) -> Counter[Key]:
        """Returns for each job how often its measuring process died."""
        return Counter(posting.job.key for posting in self.all() if posting.lost and posting.dropped not in (GIVEN_BACK, _TWICE))

    def start(self, posting: Posting) -> bool:
        """Sets a waiting trial to running; returns False if another process was faster."""
        return _unless_finished(lambda: self._backend.set_trial_state_values(posting.trial_id, TrialState.RUNNING))

    def sign(self, posting: Posting, worker: str) -> None:
        """Writes who measures a trial."""
        self._backend.set_trial_user_attr(posting.trial_id, "worker", worker)

    def write(self, posting: Posting, result: RankTrial) -> None:
        """Writes a measurement, unless another process has finished the trial meanwhile. It is on disk when this returns."""

        def write() -> None:
            self._backend.set_trial_user_attr(posting.trial_id, "cost", result.cost)
            self._backend.set_trial_user_attr(posting.trial_id, "note", result.note)
            # The loss is written last, because it marks the result as complete.
            self._backend.set_trial_user_attr(posting.trial_id, "loss_nats", result.loss_nats)
            self._finish(posting, result)

        _unless_finished(write)

    def finish(self, posting: Posting, result: RankTrial) -> None:
        """Ends a trial whose measurement is written, unless another process has done so."""
        _unless_finished(lambda: self._finish(posting, result))

    def _finish(self, posting: Posting, result: RankTrial) -> None:
        if result.loss_nats is None:
            self._backend.set_trial_state_values(posting.trial_id, TrialState.FAIL)
        else:
            self._backend.set_trial_state_values(posting.trial_id, TrialState.COMPLETE, [result.loss_nats])

    def drop(self, posting: Posting, reason: str) -> None:
        """Ends a trial without a measurement, unless another process has finished it."""

        def write() -> None:
            self._backend.set_trial_user_attr(posting.trial_id, "dropped", reason)
            self._backend.set_trial_state_values(posting.trial_id, TrialState.FAIL)

        _unless_finished(write)

    def drop_doubles(self) -> None:
        """Drops waiting trials of jobs that have a valid one."""
        valid = {posting.trial_id for posting in self.valid().values()}
        for posting in self.all():
            if posting.state == TrialState.WAITING and posting.trial_id not in valid:
                self.drop(posting, _TWICE)


def _unless_finished(write: Callable[[], bool | None]) -> bool:
    """Writes to a trial; returns what the write returns, or False if the trial is finished already."""
    try:
        return bool(write())
    except UpdateFinishedTrialError:
        return False
