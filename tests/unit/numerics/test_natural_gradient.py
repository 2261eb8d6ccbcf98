"""The natural gradient against the dense Kronecker product that it stands for."""

from __future__ import annotations

import pytest
import torch

from regraft.errors import InputError
from regraft.numerics.natural_gradient import natural_gradient


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(width: int, seed: int) -> torch.Tensor:
    rows = random(3 * width, width, seed=seed)
    return rows.T @ rows / len(rows)


def test_it_solves_with_the_damped_kronecker_product():
    gradient, inputs, outputs, damping = random(4, 6), moments(6, 1), moments(4, 2), 0.3
    damped_in = inputs + damping * inputs.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    damped_out = outputs + damping * outputs.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    # Row-major vec(W): vec(M W C) = (M (x) C) vec(W).
    expected = torch.linalg.solve(torch.kron(damped_out, damped_in), gradient.flatten()).view(4, 6)
    torch.testing.assert_close(natural_gradient(gradient, inputs, outputs, damping), expected, rtol=1e-9, atol=1e-9)


def test_one_step_solves_linear_regression():
    """For squared error the Fisher information is C (x) I exactly, and one whole step ends in the minimum."""
    rows, target = random(50, 6), random(50, 4, seed=1)
    weight = random(4, 6, seed=2)
    inputs = rows.T @ rows / len(rows)
    gradient = (weight @ rows.T - target.T) @ rows / len(rows)
    step = natural_gradient(gradient, inputs, torch.eye(4, dtype=torch.float64), damping=1e-10)
    expected = torch.linalg.lstsq(rows, target).solution.T
    torch.testing.assert_close(weight - step, expected, rtol=1e-7, atol=1e-7)


def test_channels_that_never_fire_are_left_alone():
    assert not natural_gradient(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3, 3)).any()


def test_what_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        natural_gradient(torch.full((2, 2), torch.nan), torch.eye(2), torch.eye(2))
