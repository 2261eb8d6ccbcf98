"""Chains of factors: their products, their starts, and their gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planted import plant, seen
from regraft.numerics.chain import Chain, compressed_start, full_start, gradients, narrow_start
from regraft.numerics.frames import compact_frames
from regraft.numerics.svd import top_triplets


def starts(rows: int, columns: int, depth: int) -> dict[str, Chain]:
    generator = torch.Generator().manual_seed(3)
    frames = compact_frames(top_triplets(plant(rows, columns, 3), 2), generator)
    return {
        "full": full_start((rows, columns), depth, 0.5, generator),
        "narrow": narrow_start((rows, columns), 4, depth, 0.5, generator),
        "compressed": compressed_start(frames, depth, 0.5, 0.01),
    }


def by_hand(factors: list[Tensor]) -> Tensor:
    result = torch.eye(factors[0].shape[1], dtype=torch.float64)
    for factor in factors:
        result = factor @ result
    return result


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("kind", ["full", "narrow", "compressed"])
@pytest.mark.parametrize("shape", [(9, 9), (12, 8), (8, 12)])
def test_gradients_equal_autograd(kind: str, depth: int, shape: tuple[int, int]) -> None:
    chain = starts(*shape, depth)[kind]
    generator = torch.Generator().manual_seed(4)
    factors = [factor + 0.1 * torch.randn(factor.shape, generator=generator, dtype=torch.float64) for factor in chain.factors]
    chain = Chain(tuple(factors), chain.rates, chain.frames)
    target, mask = plant(*shape, 3), seen(*shape, 0.5)
    leaves = [factor.clone().requires_grad_() for factor in factors]
    loss = 0.5 * (mask * (by_hand(leaves) - target)).square().sum()
    loss.backward()
    residual = mask * (chain.end_to_end() - target)
    found = gradients(chain, residual @ chain.factors[0].T, chain.left().T @ residual)
    for leaf, gradient in zip(leaves, found, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(chain.end_to_end(), by_hand(factors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_starts_have_the_scale_that_the_theorem_asks_for(depth: int) -> None:
    found = starts(10, 10, depth)
    eye = torch.eye(10, dtype=torch.float64)
    for factor in found["full"].factors:
        torch.testing.assert_close(factor.T @ factor, 0.25 * eye, rtol=0, atol=1e-12)
    for factor in found["compressed"].inner:
        assert torch.equal(factor, 0.5 * torch.eye(4, dtype=torch.float64))
    values = torch.linalg.svdvals(found["compressed"].end_to_end())
    torch.testing.assert_close(values[:4], torch.full((4,), 0.5**depth, dtype=torch.float64), rtol=0, atol=1e-12)
    assert len(found["compressed"].inner) == depth
    assert found["compressed"].rates == (0.01, *(1.0,) * depth, 0.01)


def test_the_compressed_chain_has_the_promised_number_of_parameters() -> None:
    depth, dimension, width = 3, 10, 4
    found = starts(dimension, dimension, depth)
    assert found["full"].parameters == depth * dimension**2
    assert found["compressed"].parameters == 2 * dimension * width + depth * width**2
