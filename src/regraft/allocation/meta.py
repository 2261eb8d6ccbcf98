r"""Offline meta-learning: a prior for the next search, learned from past searches (the first phase of arXiv 2406.15734).

Every search has its own shared parameters (size of the gains, half-rank, weight of each feature, share of a gain that a short recovery
shows). They are modelled as draws from one Gaussian, whose mean and covariance are estimated by expectation maximisation: each search is
fitted under the present prior, and then the prior becomes the mean and scatter of the fits. The default prior counts as two additional
searches, so that a few searches cannot make the prior overconfident.

A store is a folder of JSON files, each a :class:`regraft.plans.PastSearch`, or any folder that contains search folders.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.concave import Posterior
from regraft.allocation.features import standardized
from regraft.allocation.fitting import fit
from regraft.allocation.observations import canonical, group_means, observe
from regraft.allocation.prior import BASE_NAMES, Prior, default_prior
from regraft.allocation.validation import errors
from regraft.atomic import write_text
from regraft.errors import DataError, PlanError, shown
from regraft.plans import CrossValidation, PastSearch, from_json, to_dict, to_json
from regraft.reading import is_folder, read_bytes

PAST = "past_search.json"
"""Name of the file in a search folder that holds its :class:`regraft.plans.PastSearch`."""

_ITERATIONS = 3
_DEFAULT_COUNTS_AS = 2.0
_PARTS = 5
_FEWEST_TRIALS = 4
_LARGEST = 1e15  # of any count or feature; above, squares overflow in sums


@dataclass(frozen=True)
class Training:
    """A trained prior, with the cross-validated error of priors trained in the same way.

    Attributes:
        prior: The prior, trained on all searches.
        searches: Number of searches.
        left_out: Error on left-out searches, predicted from their features alone before any of their trials.
        untrained: The same error for the default prior.
    """

    prior: Prior
    searches: int
    left_out: CrossValidation
    untrained: CrossValidation


def add_to_store(folder: Path, search: PastSearch) -> Path:
    """Writes a search into a store and returns the file. Its name is a hash of the contents, so that a search is never stored twice.

    Raises:
        OutputError: The file cannot be written.
    """
    text = to_json(search) + "\n"
    path = folder / f"search-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    write_text(path, text)
    return path


def read_store(folder: Path) -> tuple[PastSearch, ...]:
    """Reads all searches of a store, each once, in the order of the file names: its own files, and those of search folders below it.

    If there are search folders, files of the store itself that hold something else, such as plans, are skipped.

    Raises:
        DataError: The folder does not exist or holds no search, or a file cannot be read.
        PlanError: A file is not a search.
    """
    if not is_folder(folder):
        raise DataError(f"store '{shown(folder)}' is no folder; give the folder in which searches were kept, one JSON file each")
    kept = set(folder.rglob(PAST))
    files = sorted({*folder.glob("*.json"), *kept})
    if not files:
        raise DataError(f"store '{folder}' holds no search; give the folder in which searches were kept, one JSON file each")
    found: dict[str, PastSearch] = {}
    for path in files:
        try:
            search = checked_search(from_json(PastSearch, read_bytes(path, DataError)))
            found.setdefault(to_json(search), search)
        except PlanError as error:
            if path in kept or not kept:
                raise PlanError(f"{path}: {error}") from None
    return tuple(found.values())


def checked_search(search: PastSearch) -> PastSearch:
    """Returns a search whose numbers can be learned from.

    Raises:
        PlanError: A loss or a share is no positive number, a vector does not fit the slots, or there is nothing to choose.
    """
    space = search.space
    if not space.slots or not space.choices or min(space.choices) < 1 or list(space.choices) != sorted(set(space.choices)):
        raise PlanError("not a PastSearch: it has no slots or no ranks to choose from; remove the file")
    if space.uniform not in space.choices or not 0 < space.budget < _LARGEST or not 0 <= search.ratio < 1:
        raise PlanError(
            f"not a PastSearch: uniform rank {shown(space.uniform, 30)}, budget {shown(space.budget, 30)} or ratio "
            f"{shown(search.ratio, 30)} cannot be; remove the file"
        )
    for slot in space.slots:
        counts = all(1 <= number < _LARGEST for number in (slot.parameters_per_rank, slot.limit))
        if not counts or not all(abs(value) < _LARGEST for value in slot.features.values()):  # NaN is below nothing
            raise PlanError(f"not a PastSearch: the numbers of the slot '{shown(slot.name, 60)}' cannot be; remove the file")
    for trial in search.trials:
        fine = len(trial.ranks) == len(space.slots) and set(trial.ranks) <= set(space.choices)
        fine = fine and 0 <= trial.cost < _LARGEST
        if not fine or not (math.isfinite(trial.fidelity) and 0 < trial.fidelity <= 1):
            raise PlanError(f"not a PastSearch: the trial of ranks {shown(trial.ranks, 60)} does not fit its space; remove the file")
        if trial.loss_nats is not None and not (math.isfinite(trial.loss_nats) and 0 < trial.loss_nats < 1e4):
            raise PlanError(f"not a PastSearch: a loss of {trial.loss_nats} nats cannot be; remove the file")
    return search


def train(searches: Sequence[PastSearch]) -> Training:
    """Trains a prior on searches, and measures the error of such priors on left-out searches.

    Raises:
        DataError: Fewer than two searches have at least four successful trials.
    """
    usable = [search for search in searches if sum(trial.loss_nats is not None for trial in search.trials) >= _FEWEST_TRIALS]
    if len(usable) < 2:
        raise DataError(
            f"{len(usable)} of {len(searches)} searches have {_FEWEST_TRIALS} successful trials; a prior needs two: search more"
        )
    parts = min(len(usable), _PARTS)
    trained: list[tuple[PastSearch, Prior]] = []
    for part in range(parts):
        prior = _maximised([search for place, search in enumerate(usable) if place % parts != part])
        trained += [(search, prior) for search in usable[part::parts]]
    left_out = _error(trained, parts)
    untrained = _error([(search, default_prior()) for search, _ in trained], parts)
    made_from = {
        "searches": len(usable),
        "models": sorted({search.model for search in usable}),
        "ratios": sorted({search.ratio for search in usable}),
        "trials": sum(len(search.trials) for search in usable),
        "left_out": to_dict(left_out),
        "untrained": to_dict(untrained),
    }
    return Training(replace(_maximised(usable), made_from=made_from), len(usable), left_out, untrained)


def _maximised(searches: Sequence[PastSearch]) -> Prior:
    """Returns the most probable Gaussian for the searches' shared parameters."""
    features = tuple(dict.fromkeys(name for search in searches for name in sorted(standardized(search.space))))
    mean, covariance = default_prior().over(features)
    start = prior = replace(default_prior(), features=features, mean=mean, covariance=covariance)
    for _ in range(_ITERATIONS):
        posteriors = [fit(search.space, search.trials, prior) for search in searches]
        fitted = [_shared(search, posterior, prior) for search, posterior in zip(searches, posteriors, strict=True)]
        weight = _DEFAULT_COUNTS_AS + len(fitted)
        mean = (_DEFAULT_COUNTS_AS * start.mean + sum(own for own, _ in fitted)) / weight
        scatter = _DEFAULT_COUNTS_AS * (start.covariance + np.outer(start.mean - mean, start.mean - mean))
        for own, spread in fitted:
            scatter = scatter + spread + np.outer(own - mean, own - mean)
        prior = Prior(
            features,
            mean,
            scatter / weight,
            _pooled(start.log_spread, [float(np.log(posterior.spread)) for posterior in posteriors]),
            _pooled(start.log_noise, [float(np.log(posterior.noise_nats)) for posterior in posteriors]),
        )
    return prior


def _shared(search: PastSearch, posterior: Posterior, prior: Prior) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns mean and covariance of a search's shared parameters; coefficients of features that it lacks are those of the prior."""
    base = len(BASE_NAMES)
    places = [*range(base), *(base + prior.features.index(name) for name in standardized(search.space))]
    own, covariance = posterior.shared()
    mean, spread = prior.mean.copy(), np.diag(np.diag(prior.covariance))
    mean[places] = own
    spread[np.ix_(places, places)] = covariance
    return mean, spread


def _pooled(default: tuple[float, float], values: Sequence[float]) -> tuple[float, float]:
    weight = _DEFAULT_COUNTS_AS + len(values)
    mean = (_DEFAULT_COUNTS_AS * default[0] + sum(values)) / weight
    squares = _DEFAULT_COUNTS_AS * (default[1] ** 2 + (default[0] - mean) ** 2) + sum((value - mean) ** 2 for value in values)
    return mean, float(np.sqrt(squares / weight))


def _error(trained: Sequence[tuple[PastSearch, Prior]], parts: int) -> CrossValidation:
    """Returns the error of each prior's predictions for the real recoveries of its search, before any of their trials.

    Losses and predictions of a search are divided by the spread of its losses, so that every search has the same weight. The root mean
    square error is multiplied by the mean spread of the searches.
    """
    pairs = [pair for search, prior in trained if len((pair := _foreseen(search, prior))[0]) and pair[0].any()]
    if not pairs:
        return CrossValidation(0.0, 0.0, 0.0, 0, parts)
    spreads = [float(measured.std()) for measured, _ in pairs]
    measured, expected = (
        np.concatenate([values / spread for values, spread in zip(side, spreads, strict=True)]) for side in zip(*pairs, strict=True)
    )
    found = errors(measured, expected, parts)
    return replace(found, rmse_nats=found.rmse_nats * float(np.mean(spreads)))


def foresight(search: PastSearch, prior: Prior, seen: int = 0) -> CrossValidation:
    """Returns the error on a search's later real recoveries, for a model with this prior after the first ``seen`` trials."""
    measured, expected = _foreseen(search, prior, seen)
    return errors(measured, expected, 1) if len(measured) else CrossValidation(0.0, 0.0, 0.0, 0, 1)


def _foreseen(search: PastSearch, prior: Prior, seen: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns losses (N,) and their predictions (N,) after the first ``seen`` trials, both centred within each group."""
    real = [trial for trial in search.trials[seen:] if trial.kind == "recovery" and trial.loss_nats is not None]
    real.sort(key=canonical)
    observed = observe(search.space, real)
    posterior = fit(search.space, search.trials[:seen], prior)
    predicted = -posterior.moments([trial.ranks for trial in real])[0] * posterior.scale(observed.fidelity)
    return observed.without_offsets(), predicted - group_means(predicted, observed.group)
