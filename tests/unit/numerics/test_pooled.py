"""Moments of inputs against torch's own covariance of each group."""

from __future__ import annotations

import pytest
import torch

from regraft.numerics.pooled import PooledMoments


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pooled_covariance_is_the_mean_of_the_groups_own() -> None:
    groups = [draw(3, 5, 6, seed=seed) + 4.0 * seed for seed in range(4)]
    found = PooledMoments.empty(6, 4)
    for index, rows in enumerate(groups):
        for part in rows:  # in pieces
            found.add(part, index)
    expected = torch.stack([torch.cov(rows.reshape(-1, 6).double().T) for rows in groups]).mean(dim=0)
    torch.testing.assert_close(found.covariance_DD, expected, rtol=1e-9, atol=1e-9)
    all_rows = torch.cat([rows.reshape(-1, 6) for rows in groups]).double()
    torch.testing.assert_close(found.second_DD, all_rows.T @ all_rows / len(all_rows))
    torch.testing.assert_close(found.mean_D, all_rows.mean(dim=0))
    torch.testing.assert_close(found.magnitude_D, all_rows.abs().mean(dim=0))
    assert found.count == 60
    whole = torch.cov(all_rows.T)
    assert float((found.covariance_DD - whole).abs().max()) > 1.0, "the groups differ, so that pooling must matter here"


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_have_no_covariance(rows: int) -> None:
    found = PooledMoments.empty(3, 2)
    found.add(draw(rows, 3))
    assert not found.covariance_DD.any()
