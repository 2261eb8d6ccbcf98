"""A short, paired sweep of learning rates before a recovery: the rate matters more than the kind of adapter or its ranks.

Every rate trains for an eighth of the steps from the same first values on the same batches, with the whole schedule in these steps, and is
judged by the held-out loss at their end. The sweep walks: from the adapter's own rate upwards while the loss falls, else downwards.
Controlled comparisons of adapters find that a tuned rate leaves little between them (arXiv 2602.04998, 2601.22708).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from regraft.training.distributed import process_count
from regraft.training.job import Job

SHARE = 8  # a short run takes this part of the steps
FEWEST_STEPS = 8  # shorter runs than this say nothing of a rate
UPWARDS, DOWNWARDS = (3.0, 10.0), (0.3, 0.1)


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried.

    Attributes:
        lr: Peak learning rate.
        loss: Held-out loss after the short run; infinite where training diverged.
    """

    lr: float
    loss: float


@dataclass(frozen=True)
class Rates:
    """The rates that were tried before a recovery.

    Attributes:
        tried: The rates, in the order in which they were tried; the first is the adapter's own.
        steps: Optimizer steps of each.
    """

    tried: tuple[Rate, ...]
    steps: int

    @property
    def best(self) -> float:
        """The rate with the lowest loss; the first one tried where none trains."""
        return min(self.tried, key=lambda rate: rate.loss).lr

    def __str__(self) -> str:
        """Returns the chosen rate and the losses of all that were tried."""
        losses = ", ".join(f"{rate.lr:g}: {rate.loss:.4f}" for rate in sorted(self.tried, key=lambda rate: rate.lr))
        return f"{self.best:g}, the best of {len(self.tried)} after {self.steps} steps each ({losses})"


def steps_of_a_sweep(job: Job) -> int:
    """Returns the optimizer steps with which each rate is tried; 0 where the rate is given or the recovery is too short.

    Several processes do not sweep: what a sharded model held before the first step cannot be put back.
    """
    settings = job.settings
    if settings.lr is not None or not settings.lr_sweep or process_count() > 1:
        return 0
    steps = settings.steps // SHARE
    return steps if steps >= FEWEST_STEPS else 0


def shortened(job: Job, lr: float, steps: int) -> Job:
    """Returns a job of the same rows with another rate and fewer steps, which is judged at its end alone and reports to nobody."""
    short = {"lr": lr, "steps": steps, "eval_every": steps, "patience": None, "report_to": (), "merge": False}
    return dataclasses.replace(job, settings=job.settings.model_copy(update=short), work=job.work / "rates", resumed=None)


def try_rates(first: float, loss_of: Callable[[float], float]) -> tuple[Rate, ...]:
    """Tries rates from the first upwards while the loss falls, and downwards where it does not fall upwards.

    Args:
        first: The adapter's own rate.
        loss_of: Held-out loss of a short run with a rate; infinite or NaN where it diverges.

    >>> [rate.lr for rate in try_rates(1.0, lambda lr: abs(lr - 3.0))]
    [1.0, 3.0, 10.0]
    >>> [rate.lr for rate in try_rates(1.0, lambda lr: lr)]
    [1.0, 3.0, 0.3, 0.1]
    """

    def tried(lr: float) -> Rate:
        loss = loss_of(lr)
        return Rate(lr, loss if math.isfinite(loss) else math.inf)

    found = [tried(first)]
    for factors in (UPWARDS, DOWNWARDS):
        for factor in factors:
            found.append(tried(first * factor))
            if found[-1].loss >= min(rate.loss for rate in found[:-1]):
                break
        if min(found, key=lambda rate: rate.loss).lr > first:
            break
    return tuple(found)
