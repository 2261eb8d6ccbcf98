"""Truncations in a metric against Eckart and Young's theorem written out densely, and against random matrices of the same rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics.truncation import truncation
from regraft.numerics.whitening import Metric, root_of

RANKS = (1, 3, 5, 7)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(width: int, rows: int, seed: int) -> Tensor:
    drawn = draw(rows, width, seed=seed) * torch.linspace(0.1, 3.0, width, dtype=torch.float64)
    return drawn.T @ drawn / rows


def error(weight: Tensor, other: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """The squared error in both metrics, by its definition."""
    gap = weight - other
    return float((outputs @ gap @ inputs @ gap.T).trace())


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 8)])
def test_the_price_is_what_is_lost_and_nothing_of_the_rank_loses_less(shape: tuple[int, int]) -> None:
    weight, inputs, outputs = draw(*shape), moments(shape[1], 60, 1), moments(shape[0], 60, 2)
    found = truncation(weight, Metric(inputs), Metric(outputs))
    damage = found.damage()
    assert len(damage) == 9
    for rank in RANKS:
        factors = found.at(rank)
        product = factors.left_OR @ factors.right_RI
        assert torch.linalg.matrix_rank(product) == rank
        lost = error(weight, product, inputs, outputs)
        assert lost == pytest.approx(float(damage[rank]), rel=1e-9)
        for seed in range(5):  # a minimum: no nearby matrix of the rank is better
            other = (factors.left_OR + 1e-3 * draw(shape[0], rank, seed=seed)) @ (
                factors.right_RI + 1e-3 * draw(rank, shape[1], seed=seed + 9)
            )
            assert error(weight, other, inputs, outputs) > lost


@pytest.mark.parametrize("shape", [(7, 10), (10, 7)])
def test_it_is_the_textbook_formula(shape: tuple[int, int]) -> None:
    """M^-1/2 [M^1/2 W C^1/2]_r C^-1/2 with both roots, of which ours takes the smaller one."""
    weight, inputs, outputs = draw(*shape), moments(shape[1], 80, 1), moments(shape[0], 80, 2)
    left, right = root_of(outputs), root_of(inputs)
    u, s, v = torch.linalg.svd(left.root_DD @ weight @ right.root_DD, full_matrices=False)
    expected = left.inverse_DD @ (u[:, :4] * s[:4]) @ v[:4] @ right.inverse_DD
    factors = truncation(weight, Metric(inputs), Metric(outputs)).at(4)
    torch.testing.assert_close(factors.left_OR @ factors.right_RI, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_full_rank_is_the_weight_even_where_inputs_are_singular(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    found = truncation(weight, Metric(moments(shape[1], 3, 1)), None)
    factors = found.at(6)
    torch.testing.assert_close(factors.left_OR @ factors.right_RI, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (12, 8)])
def test_inputs_that_never_vary_do_not_explode(shape: tuple[int, int]) -> None:
    """Three directions were seen; what is kept of the others is a projection of the weight, and so no larger than it."""
    weight = draw(*shape)
    factors = truncation(weight, Metric(moments(8, 3, 1)), None).at(3)
    assert float(torch.linalg.matrix_norm(factors.left_OR @ factors.right_RI, 2)) <= float(torch.linalg.matrix_norm(weight, 2)) + 1e-6
    rows = draw(3, 8, seed=1) * torch.linspace(0.1, 3.0, 8, dtype=torch.float64)
    torch.testing.assert_close(rows @ (factors.left_OR @ factors.right_RI).T, rows @ weight.T, rtol=1e-6, atol=1e-6)


def test_the_bias_keeps_the_mean_of_the_outputs() -> None:
    weight, mean = draw(6, 8), draw(8, seed=3)
    factors = truncation(weight, None, None, mean_I=mean).at(2)
    assert factors.bias_O is not None
    torch.testing.assert_close(factors.left_OR @ (factors.right_RI @ mean) + factors.bias_O, weight @ mean, rtol=1e-10, atol=1e-10)


def test_shortened_keeps_prices_and_the_first_terms() -> None:
    found = truncation(draw(6, 8), Metric(moments(8, 40, 1)), None, mean_I=draw(8, seed=2))
    short = found.shortened(3, torch.float32)
    torch.testing.assert_close(short.damage(), found.damage())
    mine, whole = short.at(3), found.at(3)
    torch.testing.assert_close(mine.left_OR.double(), whole.left_OR, rtol=1e-6, atol=1e-6)
    assert mine.bias_O is not None
    assert whole.bias_O is not None
    torch.testing.assert_close(mine.bias_O.double(), whole.bias_O, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "words"), [(0, "below 1"), (7, "above 6, the full rank of a 6 x 8 matrix")])
def test_ranks_out_of_range_are_refused(rank: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        truncation(draw(6, 8), None, None).at(rank)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        truncation(torch.full((2, 2), torch.inf), None, None)
