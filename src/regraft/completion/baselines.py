"""Baselines for a completion: mean, biases, a plain factorization and a truncated SVD, each tuned on the same held-out slice.

References:
    [SRE05] Srebro, Rennie, Jaakkola, "Maximum-margin matrix factorization", NIPS 2004, lemma 1: for L = 2 the squared norms of the
        factors add up to twice the nuclear norm, so a factorization with weight decay is the usual regularised one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regraft.completion.biases import fit_biases, mean_only
from regraft.completion.descent import Descent, descend
from regraft.completion.entries import EntryList, entries_of
from regraft.completion.exact import HALVINGS
from regraft.completion.held_out import Slices, least
from regraft.completion.spectral import Factors
from regraft.completion.tuning import RANKS, SHARES, SHRINKAGES, without
from regraft.errors import TrainingError
from regraft.numerics.chain import Chain, narrow_start
from regraft.numerics.checks import checked_count
from regraft.numerics.svd import Triplets

ITERATIONS = 300

Predictor = Callable[[Tensor, Tensor], Tensor]
"""A function from row and column indices to predicted values."""


class PlainProblem:
    """The factorization P Q^T (m x r, n x r) with weight decay on both, ready to be fitted at several decays.

    Args:
        entries: Residuals (ratings without mean and biases).
        rank: r, at most min(m, n).
        generator: A generator on the CPU.
    """

    def __init__(self, entries: EntryList, rank: int, generator: torch.Generator) -> None:
        checked_count(rank, "rank")
        self._entries, self._rank, self._generator = entries, min(rank, *entries.shape), generator
        self._places = (entries.rows, entries.columns)
        self.top_value = float(entries.top_triplets(1, generator).values[0])

    def fit(self, share: float) -> Factors:
        """Minimises sum (f - y)^2 / 2 + lambda (|P|^2 + |Q|^2) / 2 at lambda = share * top_value by heavy ball.

        Args:
            share: The decay, as a share of the top singular value of the observed matrix.
        """
        start = narrow_start(self._entries.shape, self._rank, 2, max(0.3 * self.top_value**0.5, 1e-12), self._generator)
        chain = self._descended(start.to(self._entries.device), share * self.top_value)
        known = (torch.bincount(index, minlength=size) > 0 for index, size in zip(self._places, self._entries.shape, strict=True))
        # Rows and columns without entries only decay. The mean and the biases predict them, so their factors are set to zero.
        return Factors(*(factor * here[:, None] for factor, here in zip((chain.factors[1], chain.factors[0].T), known, strict=True)))

    def _descended(self, start: Chain, decay: float) -> Chain:
        """Descends at the largest step size that does not diverge."""
        # The factors' largest curvature is twice the fit's top singular value. Missing entries let that grow beyond the data's.
        step = 0.5 / (4 * self.top_value) if self.top_value else 1.0
        for attempt in range(HALVINGS):
            descent = Descent(step / 2**attempt, "momentum", weight_decay=decay, max_iterations=ITERATIONS, tolerance=0.0)
            try:
                return descend(start, self._entries, descent).chain
            except TrainingError:
                continue
        raise TrainingError(
            f"the plain factorization diverged at every step size down to {step / 2**HALVINGS:.3g}; look for extreme values"
        )


def filled_svd(triplets: Triplets, rank: int) -> Factors:
    """Truncates the SVD of the observed matrix, with zeros for the unknown entries, to its leading components.

    Args:
        triplets: Singular triplets of the residuals, at least ``rank`` of them. A zero residual means that the biases predict the entry.
        rank: Number of components to keep.
    """
    return Factors(triplets.left[:, :rank] * triplets.values[:rank], triplets.right[:, :rank])


def fit_baselines(slices: Slices, entries: EntryList, rank: int, seed: int) -> dict[str, Predictor]:
    """Fits the mean, biases alone, a plain factorization and a truncated SVD, each with its strength chosen on the held-out slice.

    Args:
        slices: The entries in two parts, fitted and held out, for choosing the strengths.
        entries: All entries, for the fits that are returned.
        rank: Rank of the factorization, and upper limit for the rank of the SVD.
        seed: Seed of every random draw.

    Returns:
        Predictors by name: ``mean``, ``biases``, ``factorization``, ``truncated_svd``.
    """

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    shrinkage, _ = least(SHRINKAGES, lambda strength: slices.rmse(fit_biases(slices.fitted, strength).at))
    part, whole = fit_biases(slices.fitted, shrinkage), fit_biases(entries, shrinkage)
    part_rest, whole_rest = without(slices.fitted, part), without(entries, whole)
    problem = PlainProblem(part_rest, rank, drawn())
    share, _ = least(SHARES, lambda value: slices.rmse(_with(part.at, problem.fit(value))))
    most = min(rank, *entries.shape)
    triplets = part_rest.top_triplets(most, drawn())
    ranks = [count for count in RANKS if count < most] + [most]
    kept, _ = least(ranks, lambda count: slices.rmse(_with(part.at, filled_svd(triplets, int(count)))))
    return {
        "mean": mean_only(entries).at,
        "biases": whole.at,
        "factorization": _with(whole.at, PlainProblem(whole_rest, rank, drawn()).fit(share)),
        "truncated_svd": _with(whole.at, filled_svd(whole_rest.top_triplets(most, drawn()), int(kept))),
    }


def _with(offsets: Predictor, factors: Factors) -> Predictor:
    return lambda rows, columns: offsets(rows, columns) + entries_of(factors.left, factors.right, rows, columns)
