"""The removal order against every step solved anew from the definition, and its panels against one-by-one elimination."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import surgeon
from regraft.numerics.moments import Moments
from regraft.numerics.surgeon import removal_order


def planted(outputs: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights, second moments of inputs that depend on one another, and a metric of the outputs that is far from the identity."""
    inputs = torch.randn(400, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    root = torch.randn(outputs, outputs, dtype=torch.float64) * torch.logspace(0, -2, outputs, dtype=torch.float64)
    return torch.randn(outputs, width, dtype=torch.float64), inputs.T @ inputs / 400, root @ root.T


def least_error(weight: Tensor, second: Tensor, metric: Tensor, kept: list[int]) -> float:
    """Returns min over W' of tr(D C D' M), the weights on ``kept`` solved for from the normal equations, M not used for it."""
    new = torch.zeros_like(weight)
    if kept:
        new[:, kept] = torch.linalg.solve(second[kept][:, kept], (weight @ second)[:, kept].T).T
    return float(((weight - new) @ second @ (weight - new).T @ metric).trace())


@pytest.mark.parametrize("block", [1, 3])
def test_each_step_takes_the_cheapest_and_costs_what_the_definition_says(block: int) -> None:
    weight, second, metric = planted(5, 12)
    order, costs = removal_order(weight, second, block, damping=1e-12, metric_OO=metric)
    left, before = list(range(12)), 0.0
    for unit, cost in zip(order, costs, strict=True):
        every = {
            other: least_error(weight, second, metric, [c for c in left if c // block != other])
            for other in sorted({channel // block for channel in left})
        }
        assert min(every, key=lambda other: every[other]) == unit
        assert cost == pytest.approx(every[unit] - before, rel=1e-5, abs=1e-7 * max(costs))
        left, before = [channel for channel in left if channel // block != unit], every[unit]


def test_panels_give_what_one_channel_at_a_time_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second, metric = planted(20, 130)
    order, costs = removal_order(weight, second, metric_OO=metric)
    monkeypatch.setattr(surgeon, "_PANEL", 1)
    single, single_costs = removal_order(weight, second, metric_OO=metric)
    assert order == single
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(single_costs), rtol=1e-7, atol=1e-9)


def test_the_metric_decides_what_goes_first() -> None:
    weight = torch.eye(2, dtype=torch.float64)
    metric = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    assert removal_order(weight, torch.eye(2, dtype=torch.float64), metric_OO=metric)[0] == [1, 0]
    assert removal_order(weight, torch.eye(2, dtype=torch.float64), metric_OO=metric.flip(0, 1))[0] == [0, 1]


def test_a_channel_that_others_stand_for_is_free_and_one_that_is_silent_too() -> None:
    inputs = torch.randn(300, 6, dtype=torch.float64)
    inputs[:, 4] = inputs[:, 1] + 2 * inputs[:, 2]
    inputs[:, 5] = 0.0
    order, costs = removal_order(torch.randn(8, 6, dtype=torch.float64), inputs.T @ inputs / 300, damping=1e-9)
    assert 5 in order[:2]
    assert set(order[:2]) & {1, 2, 4}
    assert max(costs[:2]) < 1e-6 * min(costs[2:])


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        removal_order(torch.ones(2, 2), torch.full((2, 2), torch.nan, dtype=torch.float64))


@pytest.mark.slow
def test_moments_of_wide_rows_are_those_of_float64_to_a_rounding() -> None:
    rows = torch.randn(1300, 1024) * torch.logspace(-3, 2, 1024)
    seen = Moments.empty(1024)
    seen.add(rows[:700])
    seen.add(rows[700:])
    exact = rows.double().T @ rows.double()
    scale = exact.diagonal().sqrt()
    assert float(((seen.square_DD - exact) / scale / scale[:, None]).abs().max()) < 1e-6
    torch.testing.assert_close(seen.total_D, rows.double().sum(dim=0))
