"""An allocation method as an Optuna sampler.

Every trial of the study is one measurement. Its parameters are the ranks, one for each slot; its user attributes hold the fidelity and
the origin of the vector. Therefore ``optuna-dashboard`` shows a search like any other study::

    sampler = AllocatorSampler(space, learner, schedule, seed=0)
    study = optuna.create_study(storage="sqlite:///search.db", sampler=sampler)
    study.optimize(sampler.objective(measure), callbacks=[sampler.stop_when_through])

:mod:`regraft.search.run` does the same with many processes: only the sampler decides the next jobs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, cast, final

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from regraft.allocation.contract import Learner
from regraft.allocation.schedule import Schedule, next_request
from regraft.compat import storage_of, trial_id
from regraft.errors import StorageError
from regraft.plans import RankSpace, RankTrial, from_json, to_dict
from regraft.search.contract import Job, Measure
from regraft.search.optuna_codec import attributes_of, distributions, is_lost, job_of, result_of

_ROUND = "round:"


@final
class AllocatorSampler(BaseSampler):
    """A sampler of the rank vectors that a learner proposes, at the fidelities of a schedule.

    It has no state besides its arguments: the next jobs are computed from the trials of the study. The jobs of a round are written into
    the study before the first of them is measured, so that a killed search continues with the same jobs.

    Args:
        space: Space of the rank vectors.
        learner: Allocator that proposes and predicts.
        schedule: Plan of the fidelities and costs.
        seed: Seed of the proposals.
        measured_seed: Seed of batches and initial values, the same in every measurement of the search; None for ``seed``.
    """

    def __init__(self, space: RankSpace, learner: Learner, schedule: Schedule, seed: int, measured_seed: int | None = None) -> None:
        self.space = space
        self._learner = learner
        self._schedule = schedule
        self._seed = seed
        self._measured_seed = seed if measured_seed is None else measured_seed

    def plan(self, study: optuna.Study) -> tuple[Job, ...] | None:
        """Returns the jobs of the unfinished round, or else of the next round; None when the search is finished.

        Raises:
            StorageError: The study holds rounds that cannot be read.
        """
        done = {job.key: result for job, result in self._results(study)}
        rounds = self.rounds(study)
        for jobs in rounds:
            if any(job.key not in done for job in jobs):
                return jobs
        history = [done[job.key] for jobs in rounds for job in jobs]
        request = next_request(self.space, history, self._learner, self._schedule, self._seed)
        if request is None:
            return None
        number = len(rounds)
        jobs = tuple(
            Job("search", number, index, proposal.ranks, request.fidelity, request.kind, self._measured_seed, proposal.origin)
            for index, proposal in enumerate(request.proposals)
        )
        study.set_user_attr(f"{_ROUND}{number}", json.dumps([to_dict(job) for job in jobs]))
        return jobs

    def rounds(self, study: optuna.Study) -> list[tuple[Job, ...]]:
        """Returns the jobs of every round so far, in order.

        Raises:
            StorageError: A round cannot be read.
        """
        written = study.user_attrs
        try:
            numbers = sorted(int(name.removeprefix(_ROUND)) for name in written if name.startswith(_ROUND))
            listed = [json.loads(written[f"{_ROUND}{number}"]) for number in numbers]
            return [tuple(from_json(Job, json.dumps(values)) for values in jobs) for jobs in listed]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(f"study '{study.study_name}' holds rounds that are not of regraft ({error}); use another study") from None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns one parameter for each slot."""
        return distributions(self.space)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Returns the ranks of the first job that is not taken; writes its other fields into the trial's user attributes.

        If all jobs of the round are taken, or the search is finished, it returns the uniform vector, whose trial belongs to no round.
        """
        taken = {job.key for other, job in self._jobs(study) if other.number != trial.number and not is_lost(other)}
        free = [job for job in self.plan(study) or () if job.key not in taken]
        if not free:
            return {slot.name: self.space.uniform for slot in self.space.slots}
        for name, value in attributes_of(free[0]).items():
            storage_of(study).set_trial_user_attr(trial_id(trial), name, value)
        return {slot.name: rank for slot, rank in zip(self.space.slots, free[0].ranks, strict=True)}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Refuses a parameter that is not a slot of the space.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"'{param_name}' is no slot of this search; its parameters are {', '.join(distributions(self.space))}")

    def objective(self, measure: Measure) -> Callable[[optuna.Trial], float]:
        """Returns an objective for ``study.optimize``, which measures one trial, stores its cost, and returns its loss.

        Args:
            measure: Function that measures rank vectors. A failed recovery prunes its trial.
        """

        def evaluate(trial: optuna.Trial) -> float:
            for name, distribution in distributions(self.space).items():
                if isinstance(distribution, IntDistribution):
                    trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
                else:
                    trial.suggest_categorical(name, cast(CategoricalDistribution, distribution).choices)
            job = job_of(trial.study.get_trials(deepcopy=False)[trial.number], self.space)
            if job is None:
                raise optuna.TrialPruned("nothing to measure: every job of the round is taken, or the search is through")
            (result,) = measure([job])
            for name, value in (("cost", result.cost), ("note", result.note), ("loss_nats", result.loss_nats)):
                trial.set_user_attr(name, value)
            if result.loss_nats is None:
                raise optuna.TrialPruned(result.note)
            return result.loss_nats

        return evaluate

    def stop_when_through(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Stops ``study.optimize`` when the search is finished; pass it in ``callbacks``."""
        if self.plan(study) is None:
            study.stop()

    def _jobs(self, study: optuna.Study) -> Iterator[tuple[FrozenTrial, Job]]:
        for trial in study.get_trials(deepcopy=False):
            job = job_of(trial, self.space)
            if job is not None and job.phase == "search":
                yield trial, job

    def _results(self, study: optuna.Study) -> Iterator[tuple[Job, RankTrial]]:
        for trial, job in self._jobs(study):
            result = result_of(trial, job)
            if result is not None:
                yield job, result
