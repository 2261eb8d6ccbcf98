"""Confirmation that a rank vector beats the uniform one: paired comparisons on seeds that the search did not use."""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from regraft.allocation.contract import Ranks
from regraft.errors import InputError
from regraft.plans import Confirmation, Finalist, RankSpace, RankTrial


def confirm(space: RankSpace, finalists: Sequence[Ranks], trials: Sequence[RankTrial], confidence: float = 0.95) -> Confirmation:
    """Decides between the finalists of a search and the uniform vector.

    Uniform is kept unless the two-sided interval of a finalist's mean gain lies above zero. A search picks the best of many noisy
    measurements, so that its own measurements overestimate the winner; therefore the seeds must be fresh.

    The seeds are the blocks of a randomised block design: a loss is the sum of an effect of its seed, an effect of its vector, and noise
    of one variance. That variance is estimated from all vectors, with (seeds - 1) x finalists degrees of freedom. With one finalist this
    is Student's paired interval. With several, a Bonferroni correction makes all intervals hold jointly.

    Args:
        space: Space of the search.
        finalists: The vector that the search found, and other candidates.
        trials: Recoveries of the finalists and of uniform on fresh seeds. A seed on which uniform failed is ignored. A finalist that
            failed on any other seed is excluded, because its recovery may diverge.
        confidence: Joint confidence of all intervals.

    Raises:
        InputError: Uniform was recovered on fewer than two seeds, or no finalist on all of these.
    """
    uniform = space.uniform_ranks
    wanted = [ranks for ranks in dict.fromkeys(finalists) if ranks != uniform]
    if not wanted:
        return Confirmation((), uniform, confidence, "The search found nothing better than uniform ranks: uniform is kept.")
    losses = {(trial.ranks, trial.seed): trial.loss_nats for trial in trials if trial.kind == "recovery" and trial.loss_nats is not None}
    seeds = sorted({seed for ranks, seed in losses if ranks == uniform})
    able = [ranks for ranks in wanted if all((ranks, seed) in losses for seed in seeds)]
    if len(seeds) < 2 or not able:
        raise InputError(
            f"uniform could be recovered on {len(seeds)} seeds, {len(able)} of {len(wanted)} candidates on all of them; a comparison "
            "needs two seeds and a candidate: add seeds, or lower the learning rate"
        )
    table = np.array([[losses[ranks, seed] for ranks in (uniform, *able)] for seed in seeds])
    gains, half = table[:, :1] - table[:, 1:], _half_width(table, confidence)
    compared = [
        Finalist(ranks, tuple(own.tolist()), float(own.mean()), float(own.mean()) - half, float(own.mean()) + half)
        for ranks, own in zip(able, gains.T, strict=True)
    ]
    compared.sort(key=lambda finalist: -finalist.mean_nats)
    kept = compared[0].ranks if compared[0].low_nats > 0 else uniform
    return Confirmation(tuple(compared), kept, confidence, _verdict(compared[0], confidence, len(compared)))


def _half_width(table: NDArray[np.float64], confidence: float) -> float:
    """Returns the half-width of the intervals for differences from the first column of a table of losses, (seeds, vectors)."""
    seeds, vectors = table.shape
    noise = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (seeds - 1) * (vectors - 1)
    quantile = float(student.ppf(1.0 - (1.0 - confidence) / (2 * (vectors - 1)), freedom))
    return quantile * math.sqrt(2.0 * float((noise**2).sum()) / freedom / seeds)


def _verdict(best: Finalist, confidence: float, finalists: int) -> str:
    measured = (
        f"{best.mean_nats:+.5f} nats on {len(best.gains_nats)} fresh seeds, {confidence:.0%} interval "
        f"{best.low_nats:+.5f} to {best.high_nats:+.5f}"
    )
    if finalists > 1:
        measured += f", the best of {finalists} candidates"
    if best.low_nats > 0:
        return f"The new ranks beat uniform by {measured}: they are used."
    if best.high_nats < 0:
        return f"The new ranks lose to uniform ({measured}): uniform is kept."
    return f"The new ranks do not beat uniform for certain ({measured}): uniform is kept."
