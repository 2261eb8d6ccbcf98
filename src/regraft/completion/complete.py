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
from typing import Any

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
from regraft.completion.ratings import Pairs, Ratings, read_pairs, read_ratings, split_ratings
from regraft.completion.tuning import SayShare
from regraft.errors import DataError
from regraft.reading import path_of
from regraft.settings import CompletionSettings, takes_settings

ESTIMATOR_LOG = logging.getLogger("regraft.completion.estimator")
OURS = "compressed"
BASELINES = ("mean", "biases", "factorization", "truncated_svd")
VALIDATION = 0.1
"""Share of the known ratings on which our completion and the baselines choose their strengths."""


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
        seed: Seed of every random draw.
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
    seed: int
    seconds: float

    def flat(self) -> dict[str, Any]:
        """Returns the report as plain JSON types: ``rmse`` and ``mae`` of our completion, and ``baselines`` by name."""
        rest = {key: value for key, value in asdict(self).items() if key not in ("errors", "settings")}
        settings = self.settings.model_dump(mode="json")
        return {
            "rmse": self.errors[OURS].rmse,
            "mae": self.errors[OURS].mae,
            "baselines": {name: asdict(self.errors[name]) for name in BASELINES},
            **rest,
            "settings": settings,
        }


@takes_settings()
def complete_ratings(
    ratings: Path | str,
    output: Path | None = None,
    settings: CompletionSettings | None = None,
    *,
    pairs: Path | str | None = None,
    seed: int = 0,
    progress: SayShare | None = None,
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
        seed: Seed of every random draw: the held-out ratings and every fit.
        progress: Called with the name of the current step and the share of it that is done.

    Raises:
        InputError: A file or a setting cannot be used.
        DataError: All ratings are equal.
        OutputError: The folder exists or cannot be written. No half-written folder is left behind.
    """
    with reserved(output):
        return _completed(path_of(ratings, "ratings"), output, settings or CompletionSettings(), pairs, seed, progress or _say_nothing)


def _completed(
    ratings: Path, output: Path | None, settings: CompletionSettings, pairs: Path | str | None, seed: int, progress: SayShare
) -> CompletionReport:
    started = time.perf_counter()
    progress("reading", 0.0)
    table = read_ratings(ratings, settings.duplicates)
    _refuse_equal(ratings, table)
    wanted = read_pairs(pairs) if pairs is not None else None
    known, held = split_ratings(table, settings.held_out, seed)
    limits = float(known.values.min()), float(known.values.max())
    model = _estimator(settings, seed, progress)
    with _quietly():
        model.fit(known.rows, known.columns, known.values, known.shape)
    ours = _predicted(model, limits, held.rows, held.columns)
    empty = model.empty_rows_.size, model.empty_columns_.size
    progress("fitting the baselines", 0.0)
    errors = {OURS: _errors(ours, held.values), **_baseline_errors(known, held, model.rank_, seed, limits)}
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
        seed=seed,
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


def _refuse_equal(path: Path, table: Ratings) -> None:
    """Refuses ratings that are all the same number: every prediction is right, and every recommendation is arbitrary."""
    lowest, highest = float(table.values.min()), float(table.values.max())
    if lowest == highest:
        raise DataError(
            f"'{path}': all {len(table):,} ratings are {lowest:g}, so they say nothing about taste; "
            "clicks and purchases are implicit feedback: use a library that is made for it, such as implicit"
        )


def _asked_for(model: CompressedMatrixCompletion, table: Ratings, pairs: Pairs) -> tuple[Tensor, int]:
    """Predicts the requested pairs; counts those whose user or item has no rating (only the known biases predict these)."""
    rows, columns = torch.searchsorted(table.user_ids, pairs.users), torch.searchsorted(table.item_ids, pairs.items)
    limits = float(table.values.min()), float(table.values.max())
    strange = np.isin(rows.numpy(), model.empty_rows_) | np.isin(columns.numpy(), model.empty_columns_)
    return _predicted(model, limits, rows, columns), int(strange.sum())


def _estimator(settings: CompletionSettings, seed: int, progress: SayShare) -> CompressedMatrixCompletion:
    return CompressedMatrixCompletion(
        settings.rank,
        settings.depth,
        biases=settings.biases,
        threshold=settings.threshold,
        gamma=settings.gamma,
        validation_fraction=VALIDATION,
        random_state=seed,
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
