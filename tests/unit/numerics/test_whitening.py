"""Roots of second moments against what defines them, where Cholesky succeeds and where it cannot."""

from __future__ import annotations

import pytest
import torch

from regraft.errors import InputError
from regraft.numerics.whitening import root_of


def moments(width: int, rows: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.T @ drawn / rows


def test_the_root_squares_to_the_moments_and_has_an_inverse() -> None:
    second = moments(9, 40)
    root = root_of(second)
    torch.testing.assert_close(root.root_DD @ root.root_DD.T, second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root.root_DD @ root.inverse_DD, torch.eye(9, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_singular_moments_have_a_root_where_cholesky_fails() -> None:
    second = moments(12, 5)
    assert torch.linalg.cholesky_ex(second - 1e-14 * torch.eye(12, dtype=torch.float64)).info > 0
    root = root_of(second)
    torch.testing.assert_close(root.root_DD @ root.root_DD, second, rtol=0, atol=1e-10 * float(second.diagonal().max()))
    torch.testing.assert_close(root.root_DD @ root.inverse_DD, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)


def test_damping_mixes_with_the_identity_and_keeps_the_trace() -> None:
    second = moments(6, 30)
    mixed = root_of(second, damping=0.25).root_DD
    expected = 0.75 * second + 0.25 * second.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(mixed @ mixed, expected, rtol=1e-12, atol=1e-12)
    assert float((mixed @ mixed).trace()) == pytest.approx(float(second.trace()))


def test_nothing_seen_is_the_identity() -> None:
    torch.testing.assert_close(root_of(torch.zeros(3, 3)).root_DD, torch.eye(3, dtype=torch.float64))


def test_what_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"inputs of 'q' .* NaN"):
        root_of(torch.full((2, 2), torch.nan), what="inputs of 'q'")


@pytest.mark.parametrize("damping", [-0.1, 1.5])
def test_damping_is_a_share(damping: float) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        root_of(torch.eye(2), damping=damping)
