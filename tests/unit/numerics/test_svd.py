"""Decompositions against NumPy's, and against spectra that were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.errors import InputError
from regraft.numerics.frames import random_frame
from regraft.numerics.svd import canonical_signs, factored_triplets, randomized_triplets, sketched_triplets, top_triplets


def planted_spectrum(rows: int, columns: int, values: list[float], generator: torch.Generator) -> torch.Tensor:
    left = random_frame(rows, len(values), generator)
    right = random_frame(columns, len(values), generator)
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_top_triplets_equal_numpy(shape: tuple[int, int], generator: torch.Generator) -> None:
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    found = top_triplets(matrix, 4)
    left, values, right_h = np.linalg.svd(matrix.numpy(), full_matrices=False)
    truncated = left[:, :4] * values[:4] @ right_h[:4]
    np.testing.assert_allclose(found.values.numpy(), values[:4], atol=1e-12)
    np.testing.assert_allclose((found.left * found.values @ found.right.T).numpy(), truncated, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomized_triplets_find_a_planted_spectrum(dtype: torch.dtype, generator: torch.Generator) -> None:
    matrix = planted_spectrum(200, 120, [50.0, 20.0, 9.0, 4.0, 0.5, 0.4, 0.3], generator)
    found = randomized_triplets(matrix.to(dtype), 4, generator)
    exact = top_triplets(matrix, 4)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert found.left.dtype == dtype
    torch.testing.assert_close(found.values.double(), exact.values, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.left.double(), exact.left, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.right.double(), exact.right, rtol=0, atol=tolerance)


def test_the_sketch_only_multiplies_by_thin_blocks(generator: torch.Generator) -> None:
    matrix = planted_spectrum(80, 60, [9.0, 5.0, 2.0], generator)
    widths: list[int] = []

    def times(block: torch.Tensor) -> torch.Tensor:
        widths.append(block.shape[1])
        return matrix @ block

    sketched_triplets(times, lambda block: matrix.T @ block, (80, 60), 3, generator)
    assert set(widths) == {13}


def test_factored_triplets_equal_the_dense_ones(generator: torch.Generator) -> None:
    left = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    found, dense = factored_triplets(left, right), top_triplets(left @ right.T, 5)
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_canonical_signs_do_not_depend_on_the_signs_given(generator: torch.Generator) -> None:
    left, _, right = top_triplets(torch.randn(12, 9, generator=generator, dtype=torch.float64), 5)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for one, other in zip(canonical_signs(left * flips, right * flips), (left, right), strict=True):
        assert torch.equal(one, other)
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("rank", [0, -1, 21, 2.5, True, "3"])
def test_impossible_ranks_are_refused(rank: object, generator: torch.Generator) -> None:
    matrix = torch.ones(30, 20, dtype=torch.float64)
    with pytest.raises(InputError, match="rank") as refusal:
        top_triplets(matrix, rank)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="rank"):
        randomized_triplets(matrix, rank, generator)  # pyright: ignore[reportArgumentType]


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[1, 2] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        top_triplets(matrix, 2)
