"""Planted low-rank matrices, drawn from generators of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def plant(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    """A rows x columns matrix of exactly this rank with entries of variance one (float64)."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(columns, rank, generator=generator, dtype=torch.float64)
    return left @ right.T / rank**0.5


def seen(rows: int, columns: int, share: float, seed: int = 0) -> Tensor:
    """A random mask that shows about this share of the entries (bool)."""
    generator = torch.Generator().manual_seed(seed + 1_000)
    return torch.rand(rows, columns, generator=generator) < share
