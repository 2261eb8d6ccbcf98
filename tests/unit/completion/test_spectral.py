"""The spectral fit against the closed form where everything is seen, and against a convex solver where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planted import plant, seen
from regraft.completion.entries import EntryList
from regraft.completion.spectral import Scales, SpectralProblem
from regraft.errors import InputError


def listed(matrix: Tensor, mask: Tensor) -> EntryList:
    places = mask.nonzero()
    return EntryList(places[:, 0], places[:, 1], matrix[mask], (matrix.shape[0], matrix.shape[1]))


def noisy(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7)
    return plant(rows, columns, rank, seed) + noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def soft_threshold(matrix: Tensor, threshold: float) -> Tensor:
    left, values, right_h = torch.linalg.svd(matrix, full_matrices=False)
    return (left * (values - threshold).clamp(min=0)) @ right_h


def soft_impute(matrix: Tensor, mask: Tensor, threshold: float, steps: int = 3000) -> Tensor:
    """Minimises the same convex objective by proximal gradient descent over whole matrices (Mazumder et al. 2010)."""
    fitted = torch.zeros_like(matrix)
    for _ in range(steps):
        fitted = soft_threshold(torch.where(mask, matrix, fitted), threshold)
    return fitted


@pytest.mark.long
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_with_everything_seen_it_is_the_soft_threshold(depth: int) -> None:
    matrix = noisy(30, 24, 3, 0.3)
    problem = SpectralProblem(listed(matrix, torch.ones(30, 24, dtype=torch.bool)), 6, depth, Scales(), torch.Generator().manual_seed(0))
    fitted = problem.fit(0.3, max_iterations=4000, tolerance=1e-12)
    exact = soft_threshold(matrix, 0.3 * problem.top_value)
    assert problem.top_value == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)), rel=1e-9)
    found = fitted.left @ fitted.right.T
    assert float((found - exact).norm() / exact.norm()) < 0.01  # the nuclear norm is smoothed below a hundredth of the top value
    assert torch.linalg.matrix_rank(exact) == 3


@pytest.mark.long
def test_with_entries_missing_it_reaches_the_convex_minimum() -> None:
    matrix, mask = noisy(40, 30, 2, 0.3), seen(40, 30, 0.5)
    problem = SpectralProblem(listed(matrix, mask), 6, 3, Scales(), torch.Generator().manual_seed(0))
    fitted = problem.fit(0.3, max_iterations=6000, tolerance=1e-12)
    exact = soft_impute(matrix, mask, 0.3 * problem.top_value)
    assert float((fitted.left @ fitted.right.T - exact).norm() / exact.norm()) < 0.02


@pytest.mark.long
def test_scales_weigh_the_penalty() -> None:
    """With a_i and b_j, f = D_a g D_b minimises |P(f - y)|^2 / 2 + lambda |g|_*; by whole matrices, g moves by D_a (...) D_b."""
    matrix, mask = noisy(40, 30, 2, 0.3), seen(40, 30, 0.5)
    mask[:10, 20:] = False  # rows and columns with fewer entries than others
    mask[:10, 0] = True
    scales = Scales(0.4, 0.2)
    problem = SpectralProblem(listed(matrix, mask), 6, 3, scales, torch.Generator().manual_seed(0))
    fitted = problem.fit(0.3, max_iterations=6000, tolerance=1e-12)
    rows, columns = mask.sum(1).clamp(min=1).double() ** -0.4, mask.sum(0).clamp(min=1).double() ** -0.2
    weights = rows[:, None] * columns
    weights = weights / weights[mask].square().mean().sqrt()
    threshold = 0.3 * float(torch.linalg.matrix_norm(mask * weights * matrix, ord=2))
    step = 1.0 / float(weights[mask].square().max())
    free = torch.zeros_like(matrix)
    for _ in range(8000):
        free = soft_threshold(free - step * weights * mask * (weights * free - matrix), step * threshold)
    exact = weights * free
    assert float((fitted.left @ fitted.right.T - exact).norm() / exact.norm()) < 0.02


@pytest.mark.slow
def test_a_threshold_of_the_top_value_leaves_nothing() -> None:
    problem = SpectralProblem(listed(plant(20, 20, 2), seen(20, 20, 0.5)), 2, 3, Scales(), torch.Generator().manual_seed(0))
    fitted = problem.fit(1.0)
    assert not fitted.left.any()
    nearly = problem.fit(0.97, max_iterations=3000, tolerance=1e-12)
    assert float((nearly.left @ nearly.right.T).norm()) < 0.1 * float(problem.fit(0.5).left.norm())


def test_nothing_but_zeros_is_fitted_by_zeros() -> None:
    entries = listed(torch.zeros(10, 10, dtype=torch.float64), seen(10, 10, 0.5))
    fitted = SpectralProblem(entries, 2, 3, Scales(0.2, 0.2), torch.Generator().manual_seed(0)).fit(0.2)
    assert not (fitted.left @ fitted.right.T).any()


@pytest.mark.slow
def test_fits_do_not_depend_on_one_another() -> None:
    problem = SpectralProblem(listed(noisy(20, 20, 2, 0.2), seen(20, 20, 0.6)), 3, 3, Scales(), torch.Generator().manual_seed(0))
    first = problem.fit(0.4)
    problem.fit(0.2)
    assert torch.equal(problem.fit(0.4).left, first.left)


@pytest.mark.parametrize(("rank", "depth", "words"), [(6, 3, "rank 6 is too large for a 10 x 12"), (0, 3, "rank 0"), (2, 1, "depth 1")])
def test_impossible_settings_are_refused(rank: int, depth: int, words: str) -> None:
    entries = listed(plant(10, 12, 2), seen(10, 12, 0.8))
    with pytest.raises(InputError, match=words):
        SpectralProblem(entries, rank, depth, Scales(), torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"threshold -0\.1"):
        SpectralProblem(entries, 2, 3, Scales(), torch.Generator().manual_seed(0)).fit(-0.1)
