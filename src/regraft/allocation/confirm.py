"""Whether a rank vector really beats the uniform one: a paired comparison on seeds that the search has not seen."""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from regraft.allocation.contract import Ranks
from regraft.errors import InputError
from regraft.plans import Confirmation, RankSpace, RankTrial


def confirm(space: RankSpace, winner: Ranks, trials: Sequence[RankTrial], confidence: float = 0.95) -> Confirmation:
    """Decides between the winner of a search and the uniform vector.

    Uniform is kept unless the two-sided Student interval of the paired differences excludes no gain. A search picks the best of many
    noisy measurements, so that its own measurements of the winner flatter it; that is why the seeds have to be fresh.

    Args:
        space: Of the search.
        winner: What the search found.
        trials: Full recoveries of the winner and of uniform on fresh seeds; a seed where one of the two failed does not count.
        confidence: Of the interval.

    Raises:
        InputError: Fewer than two seeds have both.
    """
    uniform = (space.uniform,) * len(space.slots)
    if winner == uniform:
        return Confirmation(
            winner, uniform, (), 0.0, 0.0, 0.0, confidence, "The search found nothing better than uniform ranks: uniform is kept."
        )
    gains = _gains(uniform, winner, trials)
    if len(gains) < 2:
        raise InputError(f"{len(gains)} of the seeds have a recovery of both the winner and uniform; a comparison needs two: add seeds")
    mean, count = float(np.mean(gains)), len(gains)
    half = float(student.ppf(0.5 + confidence / 2, count - 1)) * float(np.std(gains, ddof=1)) / math.sqrt(count)
    low, high = mean - half, mean + half
    verdict = _verdict(mean, low, high, count, confidence)
    return Confirmation(winner, winner if low > 0 else uniform, gains, mean, low, high, confidence, verdict)


def _gains(uniform: Ranks, winner: Ranks, trials: Sequence[RankTrial]) -> tuple[float, ...]:
    """Returns loss of uniform minus loss of the winner for every seed that has both, at the longest recovery that both had."""
    losses = {(trial.ranks, trial.seed, trial.fidelity): trial.loss_nats for trial in trials if trial.kind == "recovery"}
    gains: list[float] = []
    for seed in sorted({trial.seed for trial in trials}):
        for fidelity in sorted({fidelity for _, _, fidelity in losses}, reverse=True):
            pair = losses.get((uniform, seed, fidelity)), losses.get((winner, seed, fidelity))
            if pair[0] is not None and pair[1] is not None:
                gains.append(pair[0] - pair[1])
                break
    return tuple(gains)


def _verdict(mean: float, low: float, high: float, count: int, confidence: float) -> str:
    measured = f"{mean:+.5f} nats on {count} fresh seeds, {confidence:.0%} interval {low:+.5f} to {high:+.5f}"
    if low > 0:
        return f"The new ranks beat uniform by {measured}: they are used."
    if high < 0:
        return f"The new ranks lose to uniform ({measured}): uniform is kept."
    return f"The new ranks do not beat uniform for certain ({measured}): uniform is kept."
