"""The theorem of arXiv 2406.04112 for any size, depth, scale and decay; and what must fail without its conditions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planted import plant
from regraft.completion.descent import Descent, Stepper, automatic_step, descend
from regraft.completion.entries import WholeMatrix
from regraft.completion.theory import (
    bases,
    blocks,
    compress,
    compression_error,
    end_to_end_basis,
    first_gradient_basis,
    null_space_basis,
    rho_path,
)
from regraft.errors import InputError
from regraft.numerics.chain import Chain, compressed_start, full_start
from regraft.numerics.frames import Frames, random_frame, subspace_distance

STEPS = 300

sizes = st.tuples(st.integers(6, 16), st.integers(1, 3)).filter(lambda pair: 2 * pair[1] < pair[0])
cases = {
    "size": sizes,
    "depth": st.integers(2, 5),
    "scale": st.floats(0.02, 0.5),
    "decay": st.floats(0.0, 0.1),
    "seed": st.integers(0, 2**31),
}


def setting(size: tuple[int, int], depth: int, scale: float, seed: int) -> tuple[Tensor, Chain, Tensor, float]:
    """A planted target, a full chain at its start, V_{1,1} and a stable step size."""
    dimension, rank = size
    target = plant(dimension, dimension, rank, seed)
    chain = full_start((dimension, dimension), depth, scale, torch.Generator().manual_seed(seed + 1))
    basis = end_to_end_basis(chain.factors, chain.end_to_end() - target, rank)
    step = automatic_step(float(torch.linalg.matrix_norm(target, ord=2)), 1.0, depth)
    return target, chain, basis, step


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "momentum"), [("gd", 0.0), ("momentum", 0.8)])
@settings(max_examples=25, deadline=None)
@given(**cases)
def test_all_learning_stays_in_the_subspace(
    optimizer: str, momentum: float, size: tuple[int, int], depth: int, scale: float, decay: float, seed: int
) -> None:
    target, chain, basis, step = setting(size, depth, scale, seed)
    width = basis.shape[1]
    descent = Descent(step, optimizer, momentum, decay, max_iterations=STEPS, tolerance=0.0)  # pyright: ignore[reportArgumentType]
    full = descend(chain, WholeMatrix(target), descent)
    small = descend(compress(chain, basis, scale, gamma=0.0), WholeMatrix(target), descent)
    rho = rho_path(scale, depth, step, decay, STEPS, momentum)[-1]
    for block, inner in zip(blocks(full.chain, bases(chain, basis, scale), width), small.chain.inner, strict=True):
        torch.testing.assert_close(block.upper, torch.zeros_like(block.upper), rtol=0, atol=1e-12)
        torch.testing.assert_close(block.lower, torch.zeros_like(block.lower), rtol=0, atol=1e-12)
        tail = rho * torch.eye(block.tail.shape[0], dtype=torch.float64)
        torch.testing.assert_close(block.tail, tail, rtol=0, atol=1e-12)
        torch.testing.assert_close(block.inner, inner, rtol=0, atol=1e-10)
    distance = float(torch.linalg.matrix_norm(full.chain.end_to_end() - small.chain.end_to_end()))
    assert distance == pytest.approx(compression_error(size[0], width, [rho] * depth), abs=1e-12)
    assert distance <= math.sqrt(size[0] - width) * scale**depth + 1e-12
    if optimizer == "gd":
        assert abs(rho) <= scale * (1 - step * decay) ** STEPS + 1e-15


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(**cases)
def test_the_three_constructions_agree(size: tuple[int, int], depth: int, scale: float, decay: float, seed: int) -> None:
    target, chain, ours, step = setting(size, depth, scale, seed)
    stepper = Stepper(chain, WholeMatrix(target), Descent(step, weight_decay=decay))
    stepper.loss()
    gradient = stepper.gradients[0]
    by_gradient = first_gradient_basis(chain.factors[0], gradient, size[1])
    by_null_space = null_space_basis(chain.factors[0], gradient, size[1])
    assert subspace_distance(ours, by_gradient) <= 1e-9
    assert subspace_distance(ours, by_null_space) <= 1e-9


def test_the_three_constructions_agree_when_entries_are_missing() -> None:
    """There the gradient has full rank; all three take its leading triplets."""
    target, chain, _, step = setting((24, 2), 3, 1e-2, 5)
    mask = torch.rand(24, 24, generator=torch.Generator().manual_seed(9)) < 0.5
    gradient = torch.where(mask, chain.end_to_end() - target, 0.0)
    stepper = Stepper(chain, WholeMatrix(target, mask), Descent(step))
    stepper.loss()
    first = stepper.gradients[0]
    ours = end_to_end_basis(chain.factors, gradient, 2)
    assert subspace_distance(ours, first_gradient_basis(chain.factors[0], first, 2)) <= 1e-9
    assert subspace_distance(ours, null_space_basis(chain.factors[0], first, 2)) <= 1e-9


def largest_breach(chain: Chain, start: Chain, basis: Tensor, scale: float, width: int) -> float:
    seen = blocks(chain, bases(start, basis, scale), width)
    return max(float(part.abs().max()) for block in seen for part in (block.upper, block.lower))


def test_adam_leaves_the_subspace() -> None:
    """Adam divides entry by entry, which no rotation commutes with: the theorem does not cover it, and it does not hold."""
    target, chain, basis, _ = setting((16, 2), 3, 0.1, 0)
    moved = descend(chain, WholeMatrix(target), Descent(0.01, "adam", max_iterations=STEPS, tolerance=0.0))
    assert largest_breach(moved.chain, chain, basis, 0.1, 4) > 1e-3
    assert moved.loss < 0.1  # it learns all the same


def test_a_subspace_of_too_small_a_rank_is_not_invariant() -> None:
    target, chain, _, step = setting((16, 3), 3, 0.1, 0)
    basis = end_to_end_basis(chain.factors, chain.end_to_end() - target, 2)
    descent = Descent(step, max_iterations=STEPS, tolerance=0.0)
    moved = descend(chain, WholeMatrix(target), descent)
    assert largest_breach(moved.chain, chain, basis, 0.1, 4) > 1e-3
    small = descend(compress(chain, basis, 0.1, 0.0), WholeMatrix(target), descent)
    assert float(torch.linalg.matrix_norm(moved.chain.end_to_end() - small.chain.end_to_end())) > 0.1


def test_a_gaussian_start_has_no_invariant_subspace() -> None:
    target, orthogonal, _, step = setting((16, 2), 3, 0.1, 0)
    generator = torch.Generator().manual_seed(3)
    factors = tuple(0.1 / 4 * torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in orthogonal.factors)
    chain = Chain(factors, (1.0,) * 3)
    basis = end_to_end_basis(chain.factors, chain.end_to_end() - target, 2)
    moved = descend(chain, WholeMatrix(target), Descent(step, max_iterations=STEPS, tolerance=0.0))
    # The start itself is no multiple of the identity outside the subspace, and what it is changes as the network learns.
    start_tails = [block.tail for block in blocks(chain, bases(orthogonal, basis, 0.1), 4)]
    tails = [block.tail for block in blocks(moved.chain, bases(orthogonal, basis, 0.1), 4)]
    assert min(float((tail - tail.diagonal().mean() * torch.eye(12, dtype=torch.float64)).abs().max()) for tail in tails) > 1e-3
    assert max(float((after - before).abs().max()) for after, before in zip(tails, start_tails, strict=True)) > 1e-3


@pytest.mark.slow
def test_frozen_random_outer_factors_cannot_learn() -> None:
    target, chain, basis, step = setting((16, 2), 3, 0.1, 0)
    generator = torch.Generator().manual_seed(4)
    random = Frames(random_frame(16, 4, generator), random_frame(16, 4, generator))
    descent = Descent(step, max_iterations=4000, tolerance=1e-12)
    lost = descend(compressed_start(random, 3, 0.1, gamma=0.0), WholeMatrix(target), descent)
    found = descend(compress(chain, basis, 0.1, gamma=0.0), WholeMatrix(target), descent)
    assert lost.loss > 0.1
    assert found.loss < 1e-3 * lost.loss


def test_a_frozen_outer_factor_does_not_move_a_bit() -> None:
    target, chain, basis, step = setting((12, 2), 3, 0.1, 0)
    start = compress(chain, basis, 0.1, gamma=0.0)
    for optimizer in ("gd", "momentum", "adam"):
        moved = descend(start, WholeMatrix(target), Descent(step, optimizer, max_iterations=50, tolerance=0.0))
        assert torch.equal(moved.chain.factors[0], start.factors[0])
        assert torch.equal(moved.chain.factors[-1], start.factors[-1])
        assert not torch.equal(moved.chain.factors[1], start.factors[1])


def test_the_discrepant_rate_is_gamma_times_the_step() -> None:
    target, chain, basis, step = setting((12, 2), 3, 0.3, 0)
    start = compress(chain, basis, 0.3, gamma=0.01)
    stepper = Stepper(start, WholeMatrix(target), Descent(step))
    stepper.loss()
    gradients = [gradient.clone() for gradient in stepper.gradients]
    stepper.step()
    for before, after, gradient, rate in zip(start.factors, stepper.chain.factors, gradients, (0.01, 1, 1, 1, 0.01), strict=True):
        torch.testing.assert_close(after, before - rate * step * gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g: full_start((6, 6), 1, 0.1, g), "depth 1 is below 2"),
        (lambda g: full_start((6, 6), 3, 0.0, g), "init scale 0 is not allowed"),
        (lambda g: full_start((6, 6), 3, float("nan"), g), "init scale nan"),
        (lambda g: compressed_start(Frames(random_frame(6, 2, g), random_frame(6, 2, g)), 3, 0.1, -0.5), "gamma -0.5"),
        (lambda g: null_space_basis(torch.eye(6), torch.eye(6), 4), "rank 4 is too large for a 6 x 6 matrix.*at most 3"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[torch.Generator], object], words: str, generator: torch.Generator) -> None:
    with pytest.raises(InputError, match=words):
        make(generator)
