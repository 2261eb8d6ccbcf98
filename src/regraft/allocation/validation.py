"""How well a performance model predicts rank vectors that it was not fitted to."""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from regraft.allocation.observations import canonical, group_means, observe
from regraft.plans import CrossValidation, RankSpace, RankTrial

Predict = Callable[[Sequence[RankTrial], Sequence[RankTrial]], NDArray[np.float64]]
"""Trials to fit to, and trials whose losses are to be predicted, to (N,) those in nats, up to an offset for each group."""

_FOLDS = 5
_FEWEST = 6


def cross_validate(space: RankSpace, trials: Sequence[RankTrial], predict: Predict) -> CrossValidation | None:
    """Returns the error of predictions for real recoveries, leaving out a fifth of the rank vectors at a time.

    All trials of a left-out vector go with it, elastic scores too. Only differences inside a group (kind, fidelity and seed) count: the
    means of the groups are taken out.

    Args:
        space: Of the search.
        trials: All so far.
        predict: Fits and predicts.

    Returns:
        The error, or None with fewer than six rank vectors to leave out.
    """
    real = [trial for trial in trials if trial.kind == "recovery" and trial.loss_nats is not None]
    real.sort(key=canonical)
    vectors = sorted({trial.ranks for trial in real})
    if len(vectors) < _FEWEST:
        return None
    expected = np.zeros(len(real))
    for fold in range(_FOLDS):
        left_out = set(vectors[fold::_FOLDS])  # neighbours in sorted order are alike: every fold takes each fifth of them
        places = [place for place, trial in enumerate(real) if trial.ranks in left_out]
        seen = [trial for trial in trials if trial.ranks not in left_out]
        expected[places] = predict(seen, [real[place] for place in places])
    observed = observe(space, real)
    return errors(observed.without_offsets(), expected - group_means(expected, observed.group), _FOLDS)


def errors(losses: NDArray[np.float64], expected: NDArray[np.float64], folds: int) -> CrossValidation:
    """Returns the error of expected losses, both (N,) in nats and centred."""
    residual = losses - expected
    total = float((losses**2).sum())
    return CrossValidation(
        r2=1.0 - float((residual**2).sum()) / total if total > 0 else 0.0,
        rmse_nats=float(np.sqrt((residual**2).mean())),
        rank_correlation=rank_correlation(losses, expected),
        trials=len(losses),
        folds=folds,
    )


def rank_correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Returns Spearman's rank correlation; 0 where either is constant."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (left, right)]
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / scale if scale > 0 else 0.0
