"""Complete a table of ratings: fit, compare with baselines on held-out ratings, recommend, write."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from regraft.atomic import atomic_folder, reserved
from regraft.completion.baselines import fit_baselines
from regraft.completion.entries import EntryList
from regraft.completion.estimator import CompressedMatrixCompletion
from regraft.completion.files import recommendations, write_pairs, write_predictions, write_rows
from regraft.completion.held_out import hold_out
from regraft.completion.ratings import Duplicates, Pairs, Ratings, read_pairs, read_ratings, split_ratings
from regraft.completion.tuning import Progress
from regraft.errors import InputError
from regraft.numerics.checks import checked_count, checked_number

ESTIMATOR_LOG = logging.getLogger("regraft.completion.estimator")
OURS = "compressed"
BASELINES = ("mean", "biases", "factorization", "truncated_svd")
VALIDATION = 0.1
"""Share of the known ratings on which our completion and the baselines choose their strengths."""

Auto = Literal["auto"]


@dataclass(frozen=True)
class CompletionSettings:
    """Settings of a completion of ratings.

    Attributes:
        rank: Rank of the completed table after the biases were subtracted; ``auto`` chooses it by held-out error.
        depth: Inner factors of the compressed factorization, at least 2.
        held_out: Share of the ratings that no fit sees; the report's errors are measured on it.
        biases: Whether mean, user and item biases are removed first.
        threshold: Share of the top singular value below which the spectrum is cut: 0 for exact data; ``auto`` searches.
        gamma: Rate of the outer factors at threshold 0.
        seed: Seed of every random draw: the held-out ratings and every fit.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        duplicates: What happens when a user rated an item twice: ``refuse``, ``mean`` or ``last``.
        recommend: How many unrated items are recommended to each user; 0 for none.
    """

    rank: int | Auto = 10
    depth: int = 3
    held_out: float = 0.1
    biases: bool = True
    threshold: float | Auto = "auto"
    gamma: float = 0.01
    seed: int = 0
    device: str = "cpu"
    duplicates: Duplicates = "refuse"
    recommend: int = 10

    def __post_init__(self) -> None:
        if self.rank != "auto":
            checked_count(self.rank, "rank")
        checked_count(self.depth, "depth", 2)
        if not 0.0 < checked_number(self.held_out, "held-out share") < 1.0:
            raise InputError(f"held-out share {self.held_out:g} is not between 0 and 1; give one such as 0.1")
        if self.threshold != "auto" and checked_number(self.threshold, "threshold") >= 1:
            raise InputError(f"threshold {self.threshold:g} leaves nothing of the spectrum; give a share below 1, or auto")
        checked_number(self.gamma, "gamma")
        checked_count(self.recommend, "recommend", 0)
        if self.duplicates not in get_args(Duplicates):
            raise InputError(f"duplicates '{self.duplicates}' is not known; choose refuse, mean or last")


@dataclass(frozen=True)
class Errors:
    """Errors of predictions on held-out ratings, in the units of the ratings."""

    rmse: float
    mae: float


@dataclass(frozen=True)
class CompletionReport:
    """Result of completing a file of ratings.

    Attributes:
        ratings: The file's path, as the caller gave it.
        errors: Errors on held-out ratings: those of our completion under ``compressed``, and those of the baselines.
        rank: Rank of the completion.
        threshold: Share of the top singular value that was cut.
        converged: False when the exact dynamics were requested (``threshold=0``) and did not reach their tolerance.
        held_out: Number of held-out ratings.
        known: Number of fitted ratings.
        users: Number of users in the file.
        items: Number of items in the file.
        empty_users: Users all of whose ratings were held out: predicted by the item's bias.
        empty_items: Items all of whose ratings were held out: predicted by the user's bias.
        unknown_pairs: Number of requested pairs whose user or item is not in the file.
        settings: The settings of the run.
        seconds: Wall-clock time from reading the file to the last prediction.
    """

    ratings: str
    errors: dict[str, Errors]
    rank: int
    threshold: float
    converged: bool
    held_out: int
    known: int
    users: int
    items: int
    empty_users: int
    empty_items: int
    unknown_pairs: int
    settings: CompletionSettings
    seconds: float

    def flat(self) -> dict[str, Any]:
        """Returns the report as plain JSON types: ``rmse`` and ``mae`` of our completion, and ``baselines`` by name."""
        rest = {key: value for key, value in asdict(self).items() if key not in ("errors", "settings")}
        settings = asdict(self.settings)
        return {
            "rmse": self.errors[OURS].rmse,
            "mae": self.errors[OURS].mae,
            "baselines": {name: asdict(self.errors[name]) for name in BASELINES},
            **rest,
            "seed": self.settings.seed,
            "settings": settings,
        }


def complete_ratings(
    ratings: Path | str,
    output: Path | None = None,
    settings: CompletionSettings | None = None,
    *,
    pairs: Path | str | None = None,
    progress: Progress | None = None,
) -> CompletionReport:
    """Completes a table of ratings and reports its error on held-out ratings, together with those of four baselines.

    Our completion and every baseline choose their strengths on the same slice of the known ratings. Then they are fitted to all known
    ratings, and their predictions are clamped to the range of the known values. Recommendations and requested pairs come from a last fit
    to all ratings, with the same choices.

    Args:
        ratings: A MovieLens-style file (:mod:`regraft.completion.ratings`).
        output: A folder to write, which must not exist: ``predictions.csv`` (held-out ratings), ``recommendations.csv``, ``pairs.csv``
            if ``pairs`` is given, and ``report.json``. None writes nothing.
        settings: Settings of the completion; None for the defaults.
        pairs: A file of the users and items whose ratings are to be predicted.
        progress: Called with the name of the current step and the share of it that is done.

    Raises:
        InputError: A file or a setting cannot be used.
        OutputError: The folder exists or cannot be written. No half-written folder is left behind.
    """
    with reserved(output):
        return _completed(Path(ratings), output, settings or CompletionSettings(), pairs, progress or _say_nothing)


def _completed(
    ratings: Path, output: Path | None, settings: CompletionSettings, pairs: Path | str | None, progress: Progress
) -> CompletionReport:
    started = time.perf_counter()
    progress("reading", 0.0)
    table = read_ratings(ratings, settings.duplicates)
    wanted = read_pairs(pairs) if pairs is not None else None
    known, held = split_ratings(table, settings.held_out, settings.seed)
    limits = float(known.values.min()), float(known.values.max())
    model = _estimator(settings, progress)
    with _quietly():
        model.fit(known.rows, known.columns, known.values, known.shape)
    ours = _predicted(model, limits, held.rows, held.columns)
    empty = model.empty_rows_.size, model.empty_columns_.size
    progress("fitting the baselines", 0.0)
    errors = {OURS: _errors(ours, held.values), **_baseline_errors(known, held, model.rank_, settings.seed, limits)}
    progress("predicting", 0.0)
    if wanted is not None:
        table = table.widened(wanted.users, wanted.items)
    with _quietly():
        model.refit(table.rows, table.columns, table.values, table.shape)
    asked, strange = _asked_for(model, table, wanted) if wanted is not None else (None, 0)
    report = CompletionReport(
        ratings=str(ratings),
        errors=errors,
        rank=model.rank_,
        threshold=model.choice_.threshold,
        converged=model.converged_,
        held_out=len(held),
        known=len(known),
        users=known.shape[0],
        items=known.shape[1],
        empty_users=empty[0],
        empty_items=empty[1],
        unknown_pairs=strange,
        settings=settings,
        seconds=time.perf_counter() - started,
    )
    if output is not None:
        with atomic_folder(output) as folder:
            write_predictions(folder / "predictions.csv", held, ours)
            if settings.recommend:
                rows = recommendations(model.predict, table, settings.recommend)
                write_rows(folder / "recommendations.csv", ("userId", "itemId", "prediction"), rows)
            if wanted is not None and asked is not None:
                write_pairs(folder / "pairs.csv", wanted, asked)
            text = json.dumps(report.flat(), indent=2, allow_nan=False, ensure_ascii=False)
            (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return report


def _asked_for(model: CompressedMatrixCompletion, table: Ratings, pairs: Pairs) -> tuple[Tensor, int]:
    """Predicts the requested pairs; counts those whose user or item has no rating (only the known biases predict these)."""
    rows, columns = torch.searchsorted(table.user_ids, pairs.users), torch.searchsorted(table.item_ids, pairs.items)
    limits = float(table.values.min()), float(table.values.max())
    strange = np.isin(rows.numpy(), model.empty_rows_) | np.isin(columns.numpy(), model.empty_columns_)
    return _predicted(model, limits, rows, columns), int(strange.sum())


def _estimator(settings: CompletionSettings, progress: Progress) -> CompressedMatrixCompletion:
    return CompressedMatrixCompletion(
        settings.rank,
        settings.depth,
        biases=settings.biases,
        threshold=settings.threshold,
        gamma=settings.gamma,
        validation_fraction=VALIDATION,
        random_state=settings.seed,
        device=settings.device,
        progress=progress,
    )


def _errors(predicted: Tensor, truth: Tensor) -> Errors:
    error = predicted - truth
    return Errors(rmse=float(error.square().mean().sqrt()), mae=float(error.abs().mean()))


def _baseline_errors(known: Ratings, held: Ratings, rank: int, seed: int, limits: tuple[float, float]) -> dict[str, Errors]:
    """Fits the baselines to the known ratings and measures them on the held-out ones."""
    entries = EntryList(known.rows, known.columns, known.values, known.shape)
    slices = hold_out(entries, VALIDATION, torch.Generator().manual_seed(seed))
    fitted = fit_baselines(slices, entries, rank, seed)
    return {name: _errors(predict(held.rows, held.columns).clamp(*limits), held.values) for name, predict in fitted.items()}


def _predicted(model: CompressedMatrixCompletion, limits: tuple[float, float], rows: Tensor, columns: Tensor) -> Tensor:
    """Returns predictions within the range of the known ratings."""
    return torch.from_numpy(model.predict(rows, columns)).clamp(*limits)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences the estimator's warnings about empty rows and convergence: the report holds both."""
    level = ESTIMATOR_LOG.level
    ESTIMATOR_LOG.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield
    finally:
        ESTIMATOR_LOG.setLevel(level)


def _say_nothing(label: str, share: float) -> None:
    """Ignores the progress, for callers that gave no callback."""
