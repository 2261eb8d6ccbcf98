"""Baselines and the choices on a held-out slice, against closed forms and planted answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from planted import plant, seen
from regraft.completion.baselines import PlainProblem, filled_svd, fit_baselines
from regraft.completion.entries import EntryList
from regraft.completion.exact import ExactSettings
from regraft.completion.held_out import hold_out, least
from regraft.completion.tuning import CompletionChoice, Search, choose_rank, within_one_standard_error
from regraft.errors import DataError, InputError
from regraft.numerics.svd import top_triplets


def listed(matrix: Tensor, mask: Tensor) -> EntryList:
    places = mask.nonzero()
    return EntryList(places[:, 0], places[:, 1], matrix[mask], (matrix.shape[0], matrix.shape[1]))


def noisy(noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 5)
    return plant(50, 40, 2, seed) + noise * torch.randn(50, 40, generator=generator, dtype=torch.float64)


def test_the_plain_factorization_is_the_soft_threshold_where_everything_is_seen() -> None:
    """By lemma 1 of Srebro et al. 2004, (|P|^2 + |Q|^2) / 2 at its least is the nuclear norm."""
    matrix = noisy(0.3)
    problem = PlainProblem(listed(matrix, torch.ones(50, 40, dtype=torch.bool)), 10, torch.Generator().manual_seed(0))
    factors = problem.fit(0.3)
    left, values, right_h = torch.linalg.svd(matrix, full_matrices=False)
    exact = (left * (values - 0.3 * values[0]).clamp(min=0)) @ right_h
    assert float((factors.left @ factors.right.T - exact).norm() / exact.norm()) < 1e-4


def test_rows_without_entries_have_no_factors() -> None:
    mask = seen(50, 40, 0.5)
    mask[3], mask[:, 7] = False, False
    factors = PlainProblem(listed(noisy(0.1), mask), 3, torch.Generator().manual_seed(0)).fit(0.1)
    assert not factors.left[3].any()
    assert not factors.right[7].any()
    assert factors.left[4].any()


def test_the_filled_svd_is_that_of_the_matrix_with_zeros() -> None:
    matrix, mask = noisy(0.1), seen(50, 40, 0.5)
    entries = listed(matrix, mask)
    factors = filled_svd(entries.top_triplets(5, torch.Generator().manual_seed(0)), 2)
    exact = top_triplets(torch.where(mask, matrix, 0.0), 2)
    torch.testing.assert_close(factors.left @ factors.right.T, exact.left * exact.values @ exact.right.T, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_baselines_rank_as_the_planted_answer_says() -> None:
    """Strong row biases and a low-rank part: the mean is worst, biases better, a factorization better still."""
    generator = torch.Generator().manual_seed(3)
    matrix = 3.0 + noisy(0.3) + 2 * torch.randn(50, 1, generator=generator, dtype=torch.float64)
    mask = seen(50, 40, 0.5)
    entries = listed(matrix, mask)
    slices = hold_out(entries, 0.1, torch.Generator().manual_seed(0))
    fitted = fit_baselines(slices, entries, 3, 0)
    rows, columns = (~mask).nonzero().unbind(1)
    errors = {name: float((predict(rows, columns) - matrix[~mask]).square().mean().sqrt()) for name, predict in fitted.items()}
    assert list(errors) == ["mean", "biases", "factorization", "truncated_svd"]
    assert errors["mean"] == pytest.approx(float((matrix[~mask] - matrix[mask].mean()).square().mean().sqrt()), rel=1e-9)
    assert errors["mean"] > 1.5 * errors["biases"]
    assert errors["factorization"] < 0.6 * errors["biases"]
    assert errors["truncated_svd"] < errors["biases"]


def test_slices_part_the_entries() -> None:
    entries = listed(noisy(0.1), seen(50, 40, 0.5))
    slices = hold_out(entries, 0.25, torch.Generator().manual_seed(0))
    held = set(zip(slices.held[0].tolist(), slices.held[1].tolist(), strict=True))
    kept = set(zip(slices.fitted.rows.tolist(), slices.fitted.columns.tolist(), strict=True))
    assert not held & kept
    assert held | kept == set(zip(entries.rows.tolist(), entries.columns.tolist(), strict=True))
    assert len(held) == round(0.25 * entries.count)
    assert slices.rmse(lambda rows, columns: slices.held[2] + 2.0) == pytest.approx(2.0)


def test_impossible_slices_are_refused() -> None:
    entries = listed(noisy(0.1), seen(50, 40, 0.5))
    for fraction in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(InputError, match="held-out fraction"):
            hold_out(entries, fraction, torch.Generator().manual_seed(0))
    single = EntryList(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]).double(), (2, 2))
    with pytest.raises(DataError, match="1 known entry cannot be split"):
        hold_out(single, 0.5, torch.Generator().manual_seed(0))


def test_a_search_stops_after_two_rises() -> None:
    asked: list[float] = []

    def error(value: float) -> float:
        asked.append(value)
        return abs(value - 3)

    assert least([1, 2, 3, 4, 5, 6, 7], error) == (3, 0)
    assert asked == [1, 2, 3, 4, 5]


def test_the_smallest_rank_within_one_standard_error_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(400, generator=generator, dtype=torch.float64)
    jitter = 0.2 * torch.randn(400, generator=generator, dtype=torch.float64)
    jitter -= jitter.mean()
    found = [
        (CompletionChoice(1, False, 0.0, 0.0), base + 0.5),
        (CompletionChoice(2, False, 0.0, 0.0), base + 0.005 + jitter),  # worse by half a standard error of 0.01
        (CompletionChoice(3, False, 0.0, 0.0), base),
    ]
    assert within_one_standard_error(found, 0.0)[0].rank == 2
    found[1] = (found[1][0], base + 0.02 + jitter)
    assert within_one_standard_error(found, 0.0)[0].rank == 3
    assert within_one_standard_error(found, 1.0)[0].rank == 1


@pytest.mark.long
def test_the_rank_of_noisy_entries_is_found() -> None:
    matrix, mask = noisy(0.3), seen(50, 40, 0.6)
    entries = listed(matrix, mask)
    slices = hold_out(entries, 0.15, torch.Generator().manual_seed(0))
    search = Search(slices, ExactSettings(max_iterations=1500), 0)
    choice, _ = choose_rank(search, entries.shape, biases=False, threshold="auto")
    assert choice.rank == 2
