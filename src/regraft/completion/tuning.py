"""Choice of a completion's biases, threshold, scales and rank by the error on held-out entries.

All choices use the same held-out slice of the known entries. The chosen completion is then fitted to all known entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from regraft.completion.biases import Biases, fit_biases, mean_only
from regraft.completion.entries import EntryList, entries_of
from regraft.completion.exact import ExactSettings, complete_exactly
from regraft.completion.held_out import Slices, least
from regraft.completion.spectral import Factors, Scales, SpectralProblem
from regraft.numerics.checks import checked_rank

SHRINKAGES = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
"""Candidates for the shrinkage of the biases, in numbers of entries."""

SHARES = (0.8, 0.65, 0.55, 0.45, 0.37, 0.3, 0.24, 0.18, 0.12, 0.06, 0.03)
"""Thresholds in units of the top singular value, from the strongest down."""

UNSCALED = Scales()
SCALES = (Scales(0.2, 0.0), Scales(0.0, 0.2), Scales(0.2, 0.2))

RANKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)

PATIENCE = 3_000
"""An exact completion stops at iteration 2 i + PATIENCE, where i is the iteration of the least held-out error so far. The dynamics
learn one component after another with long pauses, and the error may rise before it falls: a rise alone is no reason to stop."""

IMPROVED = 0.999
"""A mean squared error counts as lower when it is below this times the least one so far."""

SAME = 1.01
"""Mean squared errors within this factor count as equal."""

SayShare = Callable[[str, float], None]
"""Called with the name of the current step and the share of it that is done."""


@dataclass(frozen=True)
class CompletionChoice:
    """Settings of one completion, with nothing left open.

    Attributes:
        rank: r.
        biases: Whether mean and biases are removed first.
        shrinkage: Shrinkage of the biases.
        threshold: Share of the top singular value; 0 for the exact dynamics.
        scales: Scales of the penalty by rows and columns.
        iterations: Largest number of steps of the exact dynamics; None runs until the tolerance is reached.
    """

    rank: int
    biases: bool
    shrinkage: float
    threshold: float
    scales: Scales = UNSCALED
    iterations: int | None = None


@dataclass(frozen=True)
class Completion:
    """A completed matrix: offsets plus ``factors.left @ factors.right.T``.

    Attributes:
        choice: The settings of the fit.
        offsets: Mean and biases; all zero when they were not removed.
        factors: m x r and n x r.
        iterations: Steps of the exact dynamics; 0 for a shrunk spectrum.
        loss: Relative squared error on the entries after those steps.
    """

    choice: CompletionChoice
    offsets: Biases
    factors: Factors
    iterations: int = 0
    loss: float = 0.0

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns the completed entries for pairs of indices."""
        return self.offsets.at(rows, columns) + entries_of(self.factors.left, self.factors.right, rows, columns)


def offsets_of(entries: EntryList, choice: CompletionChoice) -> Biases:
    """Returns mean and biases of the entries, or zeros when the choice does not remove them."""
    if choice.biases:
        return fit_biases(entries, choice.shrinkage)
    return replace(mean_only(entries), mean=0.0)


def without(entries: EntryList, offsets: Biases) -> EntryList:
    """Returns the entries minus their offsets."""
    return entries.with_values(entries.values - offsets.at(entries.rows, entries.columns))


def complete_as(
    choice: CompletionChoice, entries: EntryList, exact: ExactSettings, seed: int, progress: SayShare | None = None
) -> Completion:
    """Fits one chosen completion to entries.

    Args:
        choice: Settings of the completion.
        entries: The known entries.
        exact: Settings of the exact dynamics; its depth is also used when the spectrum is shrunk.
        seed: Seed of the random frames.
        progress: Called with the name of the current step and the share of it that is done.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets_of(entries, choice)
    residuals = without(entries, offsets)
    if choice.threshold > 0:
        problem = SpectralProblem(residuals, choice.rank, exact.depth, choice.scales, generator)
        return Completion(choice, offsets, problem.fit(choice.threshold))
    settings = exact if choice.iterations is None else replace(exact, max_iterations=choice.iterations)

    def look(iteration: int, factors: Factors) -> bool:
        if progress is not None:
            progress("completing", iteration / settings.max_iterations)
        return False

    done = complete_exactly(residuals, choice.rank, settings, generator, look)
    return Completion(choice, offsets, done.factors, done.iterations, done.loss)


class Search:
    """A search for the best choice at one rank.

    Args:
        slices: The fitted and the held-out entries.
        exact: Settings of the exact dynamics; its depth is also used when the spectrum is shrunk.
        seed: Seed of every random draw.
        progress: Called with the name of the current step and the share of it that is done.
    """

    def __init__(self, slices: Slices, exact: ExactSettings, seed: int, progress: SayShare | None = None) -> None:
        self._slices, self._exact, self._seed = slices, exact, seed
        self._progress: SayShare = progress or _say_nothing
        self._shrinkage: float | None = None

    @property
    def variance(self) -> float:
        """Variance of the fitted values."""
        return float(self._slices.fitted.values.var(unbiased=False))

    def shrinkage(self) -> float:
        """Returns the best shrinkage of biases alone."""
        if self._shrinkage is None:
            fitted = self._slices.fitted
            self._shrinkage, _ = least(SHRINKAGES, lambda strength: self._slices.rmse(fit_biases(fitted, strength).at))
        return self._shrinkage

    def best(self, rank: int, biases: bool | Literal["auto"], threshold: float | Literal["auto"]) -> tuple[CompletionChoice, Tensor]:
        """Returns the best choice and the squared error of each held-out entry under it.

        Args:
            rank: r.
            biases: Whether to remove mean and biases; ``auto`` tries both.
            threshold: Share of the top singular value, 0 for the exact dynamics; ``auto`` searches.
        """
        found: list[tuple[CompletionChoice, Tensor]] = []
        for removed in (True, False) if biases == "auto" else (bool(biases),):
            base = CompletionChoice(rank, removed, self.shrinkage() if removed else 0.0, 0.0)
            found += [self._exactly(base)] if threshold == 0 else [self._shrunk(base, threshold)]
        best = min(found, key=_mean_error)
        if threshold == "auto" and best[0].threshold <= SHARES[-2]:  # hardly any shrinkage: perhaps none is better still
            found += [self._exactly(replace(choice, threshold=0.0, scales=UNSCALED)) for choice, _ in found]
        return min(found, key=_mean_error)

    def _shrunk(self, base: CompletionChoice, threshold: float | Literal["auto"]) -> tuple[CompletionChoice, Tensor]:
        """Searches the threshold, then the scales at that threshold, then the two neighbouring thresholds at the best scales."""
        offsets = offsets_of(self._slices.fitted, base)
        residuals = without(self._slices.fitted, offsets)
        tried: dict[tuple[Scales, float], Tensor] = {}

        def problem(scales: Scales) -> SpectralProblem:
            generator = torch.Generator().manual_seed(self._seed)
            return SpectralProblem(residuals, base.rank, self._exact.depth, scales, generator)

        def errors(at: SpectralProblem, scales: Scales, share: float) -> float:
            if (scales, share) not in tried:
                completion = Completion(base, offsets, at.fit(share))
                tried[scales, share] = self._slices.squared_errors(completion.at)
                self._progress("choosing the threshold", len(tried) / (len(SHARES) + 2 * len(SCALES)))
            return float(tried[scales, share].mean())

        plain = problem(UNSCALED)
        shares = SHARES if threshold == "auto" else (threshold,)
        share, _ = least(shares, lambda value: errors(plain, UNSCALED, value))
        if threshold == "auto" and SHARES[-2] < share:
            for scales in SCALES:
                errors(problem(scales), scales, share)
            scales, share = min(tried, key=lambda key: float(tried[key].mean()))
            if scales != UNSCALED:
                at = problem(scales)
                for beside in _beside(share):
                    errors(at, scales, beside)
        scales, share = min(tried, key=lambda key: float(tried[key].mean()))
        return replace(base, threshold=share, scales=scales), tried[scales, share]

    def _exactly(self, base: CompletionChoice) -> tuple[CompletionChoice, Tensor]:
        """Runs the exact dynamics and returns the choice with the iteration of least held-out error."""
        offsets = offsets_of(self._slices.fitted, base)
        residuals = without(self._slices.fitted, offsets)
        best, lowest = (0, self._slices.squared_errors(offsets.at)), math.inf

        def look(iteration: int, factors: Factors) -> bool:
            nonlocal best, lowest
            self._progress("trying without shrinkage", iteration / self._exact.max_iterations)
            errors = self._slices.squared_errors(Completion(base, offsets, factors).at)
            error = float(errors.mean())
            if error < IMPROVED * lowest:
                best, lowest = (iteration, errors), error
            return iteration > 2 * best[0] + PATIENCE

        done = complete_exactly(residuals, base.rank, self._exact, torch.Generator().manual_seed(self._seed), look)
        # An error that is nearly least at the end needs no early stop: the fit to all entries may run to the tolerance.
        at_end = float(self._slices.squared_errors(Completion(base, offsets, done.factors).at).mean())
        stopped = None if at_end <= SAME * lowest else max(1, best[0])
        return replace(base, iterations=stopped), best[1]


def choose_rank(
    search: Search, shape: tuple[int, int], biases: bool | Literal["auto"], threshold: float | Literal["auto"]
) -> tuple[CompletionChoice, Tensor]:
    """Finds the smallest rank whose held-out error is within one standard error of the least.

    Ranks are tried from 1 upwards until two in a row are no better. The errors of two ranks are compared entry by entry, so that the
    standard error is that of their difference. Differences below a millionth of the variance of the values count as zero.

    Args:
        search: The search for the other choices at each rank.
        shape: (m, n): number of rows and of columns with entries.
        biases: As in :meth:`Search.best`.
        threshold: As in :meth:`Search.best`.
    """
    found: list[tuple[CompletionChoice, Tensor]] = []
    limit = min(shape) // 2
    checked_rank(1, shape[0], shape[1])

    def error(rank: float) -> float:
        found.append(search.best(int(rank), biases, threshold))
        return float(found[-1][1].mean())

    least([rank for rank in RANKS if rank <= limit], error)
    return within_one_standard_error(found, 1e-6 * search.variance)


def within_one_standard_error(found: Sequence[tuple[CompletionChoice, Tensor]], floor: float) -> tuple[CompletionChoice, Tensor]:
    """Returns the first candidate whose mean error exceeds the least one by at most one standard error or ``floor``."""
    least_errors = min(found, key=_mean_error)[1]
    for choice, errors in found:
        excess = errors - least_errors
        spread = float(excess.std()) / math.sqrt(excess.numel()) if excess.numel() > 1 else 0.0
        if float(excess.mean()) <= max(spread, floor):
            return choice, errors
    raise AssertionError("the best candidate is within any error of itself")


def _mean_error(found: tuple[CompletionChoice, Tensor]) -> float:
    return float(found[1].mean())


def _beside(share: float) -> list[float]:
    place = SHARES.index(share)
    return [SHARES[index] for index in (place - 1, place + 1) if 0 <= index < len(SHARES)]


def _say_nothing(label: str, share: float) -> None:
    """Ignores the progress, for callers that gave no callback."""
