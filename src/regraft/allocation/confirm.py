"""Whether a rank vector really beats the uniform one: paired comparisons on seeds that the search has not seen."""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from regraft.allocation.contract import Ranks
from regraft.errors import InputError
from regraft.plans import Confirmation, Finalist, RankSpace, RankTrial


def confirm(space: RankSpace, finalists: Sequence[Ranks], trials: Sequence[RankTrial], confidence: float = 0.95) -> Confirmation:
    """Decides between the finalists of a search and the uniform vector.

    Uniform is kept unless the two-sided Student interval of a finalist's paired differences excludes no gain. A search picks the best of
    many noisy measurements, so that its own measurements of the winner flatter it; that is why the seeds have to be fresh. Several
    finalists share the error: each interval is that much wider (Bonferroni), so that all of them hold together with the confidence.

    Args:
        space: Of the search.
        finalists: What the search found, and what else may be used.
        trials: Recoveries of the finalists and of uniform on fresh seeds; a seed where one of a pair failed does not count for it.
        confidence: Of all intervals together.

    Raises:
        InputError: No finalist has two seeds where it and uniform were recovered.
    """
    uniform = (space.uniform,) * len(space.slots)
    others = [ranks for ranks in dict.fromkeys(finalists) if ranks != uniform]
    if not others:
        return Confirmation((), uniform, confidence, "The search found nothing better than uniform ranks: uniform is kept.")
    gains = {ranks: _gains(uniform, ranks, trials) for ranks in others}
    each = 1.0 - (1.0 - confidence) / len(others)
    compared = sorted((_compared(ranks, found, each) for ranks, found in gains.items() if len(found) > 1), key=lambda one: -one.mean_nats)
    if not compared:
        most = max(map(len, gains.values()))
        raise InputError(f"{most} of the seeds have a recovery of both the winner and uniform; a comparison needs two: add seeds")
    sure = [finalist for finalist in compared if finalist.low_nats > 0]
    kept = sure[0].ranks if sure else uniform
    return Confirmation(tuple(compared), kept, confidence, _verdict(sure[0] if sure else compared[0], each, len(compared)))


def _compared(ranks: Ranks, gains: tuple[float, ...], confidence: float) -> Finalist:
    mean, count = float(np.mean(gains)), len(gains)
    half = float(student.ppf(0.5 + confidence / 2, count - 1)) * float(np.std(gains, ddof=1)) / math.sqrt(count)
    return Finalist(ranks, gains, mean, mean - half, mean + half)


def _gains(uniform: Ranks, ranks: Ranks, trials: Sequence[RankTrial]) -> tuple[float, ...]:
    """Returns loss of uniform minus loss of a vector for every seed that has both, at the longest recovery that both had."""
    losses = {(trial.ranks, trial.seed, trial.fidelity): trial.loss_nats for trial in trials if trial.kind == "recovery"}
    gains: list[float] = []
    for seed in sorted({trial.seed for trial in trials}):
        for fidelity in sorted({fidelity for _, _, fidelity in losses}, reverse=True):
            pair = losses.get((uniform, seed, fidelity)), losses.get((ranks, seed, fidelity))
            if pair[0] is not None and pair[1] is not None:
                gains.append(pair[0] - pair[1])
                break
    return tuple(gains)


def _verdict(best: Finalist, confidence: float, finalists: int) -> str:
    measured = (
        f"{best.mean_nats:+.5f} nats on {len(best.gains_nats)} fresh seeds, {100 * confidence:.4g}% interval "
        f"{best.low_nats:+.5f} to {best.high_nats:+.5f}"
    )
    if finalists > 1:
        measured += f", the best of {finalists} candidates"
    if best.low_nats > 0:
        return f"The new ranks beat uniform by {measured}: they are used."
    if best.high_nats < 0:
        return f"The new ranks lose to uniform ({measured}): uniform is kept."
    return f"The new ranks do not beat uniform for certain ({measured}): uniform is kept."
