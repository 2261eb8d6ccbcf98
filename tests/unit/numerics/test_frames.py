"""Frames are orthonormal, random in the right sense, and reproducible without the global generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import InputError
from regraft.numerics.frames import (
    compact_frames,
    complete_basis,
    frame_outside,
    random_frame,
    semi_orthogonal,
    subspace_distance,
)
from regraft.numerics.svd import top_triplets


def gap(frame: torch.Tensor) -> float:
    return float((frame.T @ frame - torch.eye(frame.shape[1], dtype=frame.dtype)).abs().max())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 40), share=st.floats(0.0, 1.0), seed=st.integers(0, 2**31))
def test_random_frames_are_orthonormal(rows: int, share: float, seed: int) -> None:
    columns = max(1, round(share * rows))
    frame = random_frame(rows, columns, torch.Generator().manual_seed(seed))
    assert frame.shape == (rows, columns)
    assert gap(frame) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(4, 60),
    columns=st.integers(4, 60),
    rank=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-6, 1e6),
)
def test_compact_frames_hold_the_gradient_and_something_beside_it(rows: int, columns: int, rank: int, seed: int, scale: float) -> None:
    rank = min(rank, min(rows, columns) // 2)
    generator = torch.Generator().manual_seed(seed)
    gradient = top_triplets(scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64), rank)
    frames = compact_frames(gradient, generator)
    assert frames.left.shape == (rows, 2 * rank)
    assert frames.right.shape == (columns, 2 * rank)
    assert max(gap(frames.left), gap(frames.right)) < 1e-12
    torch.testing.assert_close(frames.left @ (frames.left.T @ gradient.left), gradient.left, rtol=0, atol=1e-12)
    torch.testing.assert_close(frames.right @ (frames.right.T @ gradient.right), gradient.right, rtol=0, atol=1e-12)


def test_square_compact_frames_come_from_an_orthogonal_matrix(generator: torch.Generator) -> None:
    """Some orthogonal Q sends V_G to B and A to U_G, so that left = Q right: the theorem's construction for that Q."""
    gradient = top_triplets(torch.randn(20, 20, generator=generator, dtype=torch.float64), 3)
    left, right = compact_frames(gradient, generator)
    q = torch.cat([left, complete_basis(left)], 1) @ torch.cat([right, complete_basis(right)], 1).T
    assert gap(q) < 1e-12
    assert subspace_distance(torch.linalg.qr(torch.cat([gradient.right, q.T @ gradient.left], 1)).Q, right) < 1e-12
    assert subspace_distance(left, q @ right) < 1e-12


def test_the_same_seed_gives_the_same_frame_and_the_global_generator_stays(generator: torch.Generator) -> None:
    before = torch.get_rng_state()
    one = random_frame(9, 4, torch.Generator().manual_seed(5))
    other = random_frame(9, 4, torch.Generator().manual_seed(5))
    assert torch.equal(one, other)
    assert not torch.equal(one, random_frame(9, 4, torch.Generator().manual_seed(6)))
    compact_frames(top_triplets(torch.eye(8, dtype=torch.float64), 2), generator)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_random_frames_are_uniform(generator: torch.Generator) -> None:
    """The mean of u u^T over uniform directions is I/n; plain QR would leave the mean of u off zero."""
    draws = torch.stack([random_frame(3, 1, generator)[:, 0] for _ in range(4000)])
    assert float(draws.mean(0).abs().max()) < 0.05
    assert float((draws.T @ draws / 4000 - torch.eye(3, dtype=torch.float64) / 3).abs().max()) < 0.03


def test_semi_orthogonal_matrices_have_orthonormal_rows_where_wide(generator: torch.Generator) -> None:
    assert gap(semi_orthogonal(4, 9, generator).T) < 1e-12
    assert gap(semi_orthogonal(9, 4, generator)) < 1e-12


def test_subspace_distance_is_the_sine_of_the_angle() -> None:
    angle = torch.tensor(0.3, dtype=torch.float64)
    one = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    other = torch.stack([angle.cos(), angle.sin()])[:, None]
    assert subspace_distance(one, other) == pytest.approx(float(angle.sin()), abs=1e-15)
    assert subspace_distance(one, torch.eye(2, dtype=torch.float64)) == 1.0


@pytest.mark.parametrize("columns", [6, 7])
def test_too_many_columns_are_refused(columns: int, generator: torch.Generator) -> None:
    with pytest.raises(InputError, match="at most"):
        random_frame(5, columns, generator)
    with pytest.raises(InputError, match="at most 3"):
        frame_outside(random_frame(5, 2, generator), columns, generator)
