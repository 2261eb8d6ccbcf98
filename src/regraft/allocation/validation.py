"""Cross-validation of performance models on rank vectors that they were not fitted to."""

# SciPy and safetensors carry few types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from regraft.allocation.observations import canonical, group_means, observe
from regraft.plans import CrossValidation, RankSpace, RankTrial

Predict = Callable[[Sequence[RankTrial], Sequence[RankTrial]], NDArray[np.float64]]
"""A function of trials to fit and N trials to predict; it returns the predicted losses in nats, (N,), up to an offset for each group."""

_FOLDS = 5
_FEWEST = 6


def cross_validate(space: RankSpace, trials: Sequence[RankTrial], predict: Predict) -> CrossValidation | None:
    """Returns the error of predictions for real recoveries, in five folds that each leave out a fifth of the rank vectors.

    All trials of a left-out vector are left out, also elastic scores. Only differences within a group (kind, fidelity and seed) matter: the
    means of the groups are subtracted.

    Args:
        space: Space of the search.
        trials: All trials so far.
        predict: Function that fits a model and predicts.

    Returns:
        The error, or None with fewer than six rank vectors.
    """
    real = [trial for trial in trials if trial.kind == "recovery" and trial.loss_nats is not None]
    real.sort(key=canonical)
    vectors = sorted({trial.ranks for trial in real})
    if len(vectors) < _FEWEST:
        return None
    expected = np.zeros(len(real))
    for fold in range(_FOLDS):
        left_out = set(vectors[fold::_FOLDS])  # neighbours in sorted order are similar, so a fold takes every fifth one
        places = [place for place, trial in enumerate(real) if trial.ranks in left_out]
        seen = [trial for trial in trials if trial.ranks not in left_out]
        expected[places] = predict(seen, [real[place] for place in places])
    observed = observe(space, real)
    return errors(observed.without_offsets(), expected - group_means(expected, observed.group), _FOLDS)


def errors(losses: NDArray[np.float64], expected: NDArray[np.float64], folds: int) -> CrossValidation:
    """Returns the error of expected losses; losses and expectations are (N,), centred, in nats."""
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
    """Returns Spearman's rank correlation; 0 when either array is constant."""
    return 0.0 if np.ptp(left) == 0 or np.ptp(right) == 0 else float(cast(Any, spearmanr(left, right)).statistic)
