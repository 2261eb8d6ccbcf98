"""Pivot rows: the same matrix to rounding, from fewer numbers."""

from __future__ import annotations

import pytest
import torch

from regraft.errors import InputError
from regraft.numerics.pivots import pivoted


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 9), (30, 40, 29), (8, 8, 1), (200, 120, 60)])
def test_it_is_the_same_matrix_from_fewer_numbers(rows: int, columns: int, rank: int) -> None:
    left, right = draw(rows, rank), draw(rank, columns, seed=1)
    found = pivoted(left, right)
    torch.testing.assert_close(found.dense(), left @ right, rtol=1e-10, atol=1e-10 * float((left @ right).abs().max()))
    assert found.rows_RI.numel() + found.others_SR.numel() == rank * (rows + columns - rank)
    assert sorted(found.order_O.tolist()) == list(range(rows))


def test_the_pivots_are_rows_of_the_matrix() -> None:
    left, right = draw(12, 4), draw(4, 7, seed=1)
    found = pivoted(left, right)
    whole = left @ right
    for row in found.rows_RI:
        assert float((whole - row).abs().sum(dim=1).min()) < 1e-10


def test_coefficients_stay_small() -> None:
    """They are what rounding to few bits is multiplied by."""
    worst = max(float(pivoted(draw(256, 128, seed=seed), draw(128, 64, seed=9)).others_SR.abs().max()) for seed in range(5))
    assert worst < 30.0


def test_dependent_columns_are_refused() -> None:
    left = draw(8, 3)
    left[:, 2] = left[:, 0] - left[:, 1]
    with pytest.raises(InputError, match="dependent columns"):
        pivoted(left, draw(3, 5))
