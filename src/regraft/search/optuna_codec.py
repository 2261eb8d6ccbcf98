"""Conversion between jobs and Optuna trials: the ranks are the parameters, user attributes hold the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from regraft.plans import RankSpace, RankTrial
from regraft.search.contract import Job

_JOB_FIELDS = ("phase", "round", "index", "fidelity", "kind", "seed", "origin")


def distributions(space: RankSpace) -> dict[str, BaseDistribution]:
    """Returns Optuna distributions for a space, one for each slot: integers with a step if the ranks are evenly spaced, else categories."""
    return {slot.name: _distribution([rank for rank in space.choices if rank <= slot.limit]) for slot in space.slots}


def _distribution(ranks: Sequence[int]) -> BaseDistribution:
    steps = {after - before for before, after in pairwise(ranks)}
    if len(steps) > 1:
        return CategoricalDistribution(ranks)
    return IntDistribution(ranks[0], ranks[-1], step=steps.pop() if steps else 1)


def job_of(trial: FrozenTrial, space: RankSpace) -> Job | None:
    """Returns the job of a trial; None for a trial that another program added to the study."""
    attributes = trial.user_attrs
    if not all(name in attributes for name in _JOB_FIELDS) or any(slot.name not in trial.params for slot in space.slots):
        return None
    return Job(ranks=tuple(int(trial.params[slot.name]) for slot in space.slots), **{name: attributes[name] for name in _JOB_FIELDS})


def attributes_of(job: Job) -> dict[str, Any]:
    """Returns the user attributes of a job's trial."""
    return {name: getattr(job, name) for name in _JOB_FIELDS}


def result_of(trial: FrozenTrial, job: Job) -> RankTrial | None:
    """Returns the measurement stored in a trial, or None without one."""
    attributes = trial.user_attrs
    if "loss_nats" not in attributes:
        return None
    return RankTrial(job.ranks, attributes["loss_nats"], job.fidelity, attributes["cost"], job.kind, job.seed, attributes["note"])


def is_lost(trial: FrozenTrial) -> bool:
    """Returns whether a trial ended without a measurement, because its process died; its job is measured again."""
    return trial.state == TrialState.FAIL and "loss_nats" not in trial.user_attrs
