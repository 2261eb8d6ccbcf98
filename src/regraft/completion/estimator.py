"""Matrix completion as a scikit-learn estimator."""

# scikit-learn and NumPy's bridge to torch carry no types: what they leave unknown is not ours to mend.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from regraft.completion.biases import Biases, fit_biases
from regraft.completion.compaction import Compact, absent, compacted, spread
from regraft.completion.entries import EntryList, entries_of
from regraft.completion.exact import ExactSettings
from regraft.completion.held_out import hold_out
from regraft.completion.inputs import Numbers, as_device, as_entries, as_indices, as_seed, as_values, check_range
from regraft.completion.tuning import Completion, CompletionChoice, SayShare, Search, choose_rank, complete_as
from regraft.errors import DataError, InputError
from regraft.numerics.checks import checked_number, checked_rank

LOG = logging.getLogger(__name__)

DENSE_LIMIT = 2**28
"""Largest matrix, in entries, that ``fit_transform`` returns (2 GiB in float64). Use ``predict`` for larger ones."""

FALLBACK_SHRINKAGE = 3.0
"""Shrinkage of the biases that predict empty rows and columns when the completion itself has no biases."""

Auto = Literal["auto"]


class CompressedMatrixCompletion(BaseEstimator):
    """Completes a low-rank matrix from some of its entries by the compressed deep factorization (arXiv 2406.04112, section 3).

    Exact entries (of a matrix of low rank) are completed by the compressed dynamics, up to the tolerance. Ratings are noisy: their mean
    and biases are removed first, and the spectrum of the residuals is shrunk (:mod:`regraft.completion.spectral`). With ``"auto"`` the
    error on a held-out slice of the given entries decides. The final fit uses all given entries.

    Args:
        rank: r, at most half the smaller side; ``"auto"``: the smallest rank whose held-out error is within one standard error of
            the least. The factorization is 2r wide; the completed matrix, without its mean and biases, has rank r.
        depth: Number of inner factors L, at least 2.
        biases: Whether mean, row and column biases are removed first; ``"auto"`` tries both.
        threshold: How strongly the spectrum is shrunk, as a share of the top singular value of the observed residuals: 0 for exact
            data, about 0.45 for ratings, ``"auto"`` to search.
        gamma: Rate of the outer factors in the exact dynamics, relative to the inner ones.
        init_scale: Scale of the start of the exact dynamics, for a top singular value of 300; None chooses it by the depth
            (:class:`~regraft.completion.exact.ExactSettings`).
        optimizer: Optimizer of the exact dynamics: ``"gd"``, ``"momentum"`` or ``"adam"``.
        max_iter: Largest number of steps of the exact dynamics.
        tol: Relative squared error on the given entries at which the exact dynamics stop.
        validation_fraction: Share of the entries held out while choosing.
        random_state: A seed, or a NumPy generator.
        device: Where to compute, such as ``"cuda"``.
        progress: Called with the name of the current step and the share of it that is done.

    Attributes:
        rank_: The rank.
        choice_: The chosen rank, biases, threshold and scales (:class:`~regraft.completion.tuning.CompletionChoice`).
        left_: m x r; zero in rows without entries.
        right_: n x r; zero in columns without entries.
        offsets_: Mean and biases.
        shape_: (m, n).
        empty_rows_: Rows without entries, predicted by the column's bias alone.
        empty_columns_: Columns without entries, predicted by the row's bias alone.
        validation_rmse_: Held-out error of the chosen completion; NaN when there was nothing to choose.
        n_iter_: Steps of the exact dynamics; 0 where the spectrum was shrunk.
        converged_: False when ``threshold=0`` and ``max_iter`` was reached before ``tol``; scikit-learn's ``ConvergenceWarning`` is
            then issued as well.

    Example:
        >>> import numpy as np
        >>> generator = np.random.default_rng(0)
        >>> truth = generator.normal(size=(40, 2)) @ generator.normal(size=(2, 30))
        >>> rows, columns = np.nonzero(generator.random((40, 30)) < 0.5)
        >>> model = CompressedMatrixCompletion(rank=2, biases=False, threshold=0, random_state=0)
        >>> completed = model.fit_transform(rows, columns, truth[rows, columns], shape=(40, 30))
        >>> bool(np.abs(completed - truth).max() < 1e-4)
        True
    """

    # scikit-learn wants one keyword for each setting: hence more parameters than the house allows elsewhere.
    def __init__(
        self,
        rank: int | Auto = 10,
        depth: int = 3,
        *,
        biases: bool | Auto = "auto",
        threshold: float | Auto = "auto",
        gamma: float = 0.01,
        init_scale: float | None = None,
        optimizer: str = "momentum",
        max_iter: int = 20_000,
        tol: float = 1e-12,
        validation_fraction: float = 0.1,
        random_state: Any = None,
        device: str = "cpu",
        progress: SayShare | None = None,
    ) -> None:
        self.rank: int | Auto = rank
        self.depth = depth
        self.biases: bool | Auto = biases
        self.threshold: float | Auto = threshold
        self.gamma = gamma
        self.init_scale = init_scale
        self.optimizer = optimizer
        self.max_iter = max_iter
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device
        self.progress = progress

    def fit(self, rows: Any, columns: Any = None, values: Any = None, shape: tuple[int, int] | None = None) -> CompressedMatrixCompletion:
        """Completes the matrix.

        Args:
            rows: Row index of each known entry, from 0. Or the matrix itself, as the only argument: a two-dimensional array with NaN
                for unknown entries, or a SciPy sparse matrix whose stored entries are the known ones.
            columns: Column of each entry.
            values: Value of each entry.
            shape: (m, n); None for the smallest shape that holds the indices.

        Raises:
            InputError: A setting or an entry cannot be used; the message names it and the reason.
            TrainingError: The descent diverged.
        """
        exact = self._checked_settings()
        compact, whole = self._read(rows, columns, values, shape)
        completion, error = self._complete(compact.entries, exact, as_seed(self.random_state))
        self.validation_rmse_ = error
        return self._keep(completion, compact, whole)

    def refit(self, rows: Any, columns: Any = None, values: Any = None, shape: tuple[int, int] | None = None) -> CompressedMatrixCompletion:
        """Completes another matrix, or the same one from more entries, with the choices of :meth:`fit`. Nothing is searched again.

        Args:
            rows: As in :meth:`fit`.
            columns: As in :meth:`fit`.
            values: As in :meth:`fit`.
            shape: As in :meth:`fit`.

        Raises:
            NotFittedError: ``fit`` has not been called.
            InputError: As in :meth:`fit`.
        """
        check_is_fitted(self)
        exact = self._checked_settings()
        compact, whole = self._read(rows, columns, values, shape)
        checked_rank(self.rank_, *compact.entries.shape)
        completion = complete_as(self.choice_, compact.entries, exact, as_seed(self.random_state), self.progress)
        return self._keep(completion, compact, whole)

    def predict(self, rows: Any, columns: Any) -> Numbers:
        """Returns the completed entries for pairs of indices.

        Args:
            rows: Row indices, from 0 to m - 1.
            columns: Column indices, as many, from 0 to n - 1.

        Raises:
            NotFittedError: ``fit`` has not been called.
            DataError: The lists differ in length, or an index is out of range.
        """
        check_is_fitted(self)
        at = as_indices(rows, "row"), as_indices(columns, "column")
        if at[0].shape != at[1].shape:
            raise DataError(f"there are {at[0].size} rows and {at[1].size} columns to predict; give as many of each")
        for index, name, size in zip(at, ("row", "column"), self.shape_, strict=True):
            check_range(index, name, size)
        i, j = torch.from_numpy(at[0]), torch.from_numpy(at[1])
        fitted = self.offsets_.at(i, j) + entries_of(torch.from_numpy(self.left_), torch.from_numpy(self.right_), i, j)
        unknown = torch.from_numpy(np.isin(at[0], self.empty_rows_) | np.isin(at[1], self.empty_columns_))
        return torch.where(unknown, self._fallback.at(i, j), fitted).numpy()

    def fit_transform(self, rows: Any, columns: Any = None, values: Any = None, shape: tuple[int, int] | None = None) -> Numbers:
        """Completes the matrix and returns all m x n entries, as scikit-learn's imputers do. Known entries keep their given values.

        Args:
            rows: As in :meth:`fit`.
            columns: As in :meth:`fit`.
            values: As in :meth:`fit`.
            shape: As in :meth:`fit`.

        Raises:
            InputError: As in :meth:`fit`, or the m x n matrix exceeds :data:`DENSE_LIMIT`.
        """
        indices, numbers, whole = as_entries(rows, columns, values, shape)
        if whole[0] * whole[1] > DENSE_LIMIT:
            raise InputError(
                f"a whole {whole[0]} x {whole[1]} matrix has more than {DENSE_LIMIT:,} numbers; use fit, and predict the entries you need"
            )
        self.fit(*indices, numbers, whole)
        grid = np.indices(whole).reshape(2, -1)
        completed = self.predict(grid[0], grid[1]).reshape(whole)
        completed[indices[0], indices[1]] = numbers
        return completed

    def score(self, rows: Any, columns: Any, values: Any) -> float:
        """Returns the coefficient of determination R^2 of the predictions, as scikit-learn's regressors do.

        Raises:
            NotFittedError: ``fit`` has not been called.
            DataError: As in :meth:`predict`; or the numbers of pairs and values differ, or are below two.
        """
        predicted, truth = self.predict(rows, columns), as_values(values)
        if predicted.shape != truth.shape or truth.size < 2:
            raise DataError(f"there are {predicted.size} pairs and {truth.size} values to compare; give as many of each, at least 2")
        error = float(np.square(predicted - truth).sum())
        return 1.0 - error / max(float(np.square(truth - truth.mean()).sum()), np.finfo(float).tiny)

    def _checked_settings(self) -> ExactSettings:
        if self.rank != "auto" and isinstance(self.rank, str):
            raise InputError(f"rank '{self.rank}' is neither a whole number nor 'auto'; give one of the two")
        if self.biases not in (True, False, "auto"):
            raise InputError(f"biases {self.biases!r} is not one of True, False and 'auto'; give one of these")
        if self.threshold != "auto" and checked_number(self.threshold, "threshold") >= 1:
            raise InputError(f"threshold {self.threshold:g} leaves nothing of the spectrum; give a share below 1, or 'auto'")
        checked_number(self.tol, "tol")
        return ExactSettings(
            depth=self.depth,
            init_scale=self.init_scale,
            gamma=self.gamma,
            optimizer=cast(Any, self.optimizer),
            tolerance=self.tol,
            max_iterations=self.max_iter,
        )

    def _complete(self, entries: EntryList, exact: ExactSettings, seed: int) -> tuple[Completion, float]:
        """Chooses the settings that are ``"auto"``, then fits to all entries."""
        if self.rank != "auto":
            checked_rank(self.rank, entries.shape[0], entries.shape[1])
        if self.rank != "auto" and self.threshold == 0 and self.biases is False:
            choice, error = CompletionChoice(int(self.rank), False, 0.0, 0.0), float("nan")
        else:
            slices = hold_out(entries, self.validation_fraction, torch.Generator().manual_seed(seed))
            search = Search(slices, exact, seed, self.progress)
            if self.rank == "auto":
                choice, errors = choose_rank(search, entries.shape, self.biases, self.threshold)
            else:
                choice, errors = search.best(int(self.rank), self.biases, self.threshold)
            error = float(errors.mean().sqrt())
        return complete_as(choice, entries, exact, seed, self.progress), error

    def _read(self, rows: Any, columns: Any, values: Any, shape: tuple[int, int] | None) -> tuple[Compact, tuple[int, int]]:
        """Returns the entries on the device, without empty rows and columns, and the shape with them."""
        indices, numbers, whole = as_entries(rows, columns, values, shape)
        i, j = (torch.from_numpy(part) for part in indices)
        return compacted(EntryList(i, j, torch.from_numpy(numbers), whole).to(as_device(self.device))), whole

    def _keep(self, completion: Completion, compact: Compact, whole: tuple[int, int]) -> CompressedMatrixCompletion:
        """Stores the fit in the caller's indices, on the CPU, and warns about empty rows and columns."""
        self.shape_, self.choice_, self.rank_ = whole, completion.choice, completion.choice.rank
        self.n_iter_ = completion.iterations
        self.converged_ = self.threshold != 0 or completion.choice.iterations is not None or completion.loss <= self.tol
        self.left_ = spread(completion.factors.left, compact.rows, whole[0]).numpy()
        self.right_ = spread(completion.factors.right, compact.columns, whole[1]).numpy()
        fallback = completion.offsets if completion.choice.biases else fit_biases(compact.entries, FALLBACK_SHRINKAGE)
        self.offsets_, self._fallback = (_widened(biases, compact, whole) for biases in (completion.offsets, fallback))
        self.empty_rows_ = absent(compact.rows, whole[0]).numpy()
        self.empty_columns_ = absent(compact.columns, whole[1]).numpy()
        self._report_empty()
        if not self.converged_:
            warnings.warn(
                f"the descent ended after {completion.iterations:,} iterations at a relative squared error of {completion.loss:.2g} on the "
                f"known entries, above tol={self.tol:g}; raise max_iter or the rank, or let threshold be 'auto' if the entries are noisy",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def _report_empty(self) -> None:
        if self.empty_rows_.size or self.empty_columns_.size:
            LOG.warning(
                "%d of %d rows and %d of %d columns have no entries; they are predicted by the bias of the other side",
                *(self.empty_rows_.size, self.shape_[0], self.empty_columns_.size, self.shape_[1]),
            )


def _widened(biases: Biases, compact: Compact, whole: tuple[int, int]) -> Biases:
    rows, columns = spread(biases.rows, compact.rows, whole[0]), spread(biases.columns, compact.columns, whole[1])
    return Biases(biases.mean, rows, columns)
