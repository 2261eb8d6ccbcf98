"""From the outcomes of items to a score with its standard error, and two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import binomtest

from regraft.errors import InputError, kind_of
from regraft.evaluation.questions import VERSION, Task
from regraft.plans import PairedScore, TaskReport, TaskScore

RESAMPLES = 2000


def score_of(task: Task, metric: str, outcomes: Sequence[float], *, higher_is_better: bool = True) -> TaskScore:
    """Returns the mean of the outcomes and its standard error, the sample's deviation over the root of the number of items."""
    count = len(outcomes)
    mean = sum(outcomes) / count
    stderr = math.sqrt(sum((value - mean) ** 2 for value in outcomes) / (count - 1) / count) if count > 1 else None
    return TaskScore(task.name, metric, mean, stderr, count, task.shots, VERSION, higher_is_better, tuple(outcomes))


def compare(first: TaskReport, second: TaskReport, *, seed: int = 0) -> tuple[PairedScore, ...]:
    """Compares two models on the tasks that both were given, item by item.

    Args:
        first: Scores of a model.
        second: Scores of another model, on the same items.
        seed: Seed of the bootstrap.

    Raises:
        InputError: The two have different numbers of items for a task, or one is no report.
    """
    reports: tuple[Any, ...] = (first, second)  # callers without a type checker pass anything
    for given in reports:
        if not isinstance(given, TaskReport):
            raise InputError(f"what is compared is {kind_of(given)}; give two results of `evaluate_tasks`")
    others = {(score.task, score.metric): score for score in second.scores}
    pairs = [(score, others[score.task, score.metric]) for score in first.scores if (score.task, score.metric) in others]
    return tuple(_paired(one, other, seed) for one, other in pairs if one.outcomes and other.outcomes)


def _paired(one: TaskScore, other: TaskScore, seed: int) -> PairedScore:
    if len(one.outcomes) != len(other.outcomes):
        raise InputError(
            f"{one.task} has {len(one.outcomes)} items for one model and {len(other.outcomes)} for the other; measure both with one `limit`"
        )
    differences_N = torch.tensor(one.outcomes, dtype=torch.float64) - torch.tensor(other.outcomes, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    count = len(differences_N)
    # In parts, so that a task of many items does not take memory for all resamples at once.
    means = torch.cat(
        [differences_N[torch.randint(count, (part, count), generator=draw)].mean(1) for part in _parts(RESAMPLES, max(1, 10**6 // count))]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    only_first, only_second = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return PairedScore(one.task, one.metric, float(differences_N.mean()), low, high, only_first, only_second, p_value)


def _parts(total: int, size: int) -> list[int]:
    """Returns numbers of at most ``size`` with the sum ``total``."""
    return [size] * (total // size) + ([total % size] if total % size else [])
