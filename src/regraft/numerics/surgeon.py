"""Removal order of a linear layer's blocks of input channels, when the other weights are re-fitted after every removal.

Optimal Brain Surgeon for structures (Hassibi and Stork 1993; ZipLM, arXiv 2302.04089, algorithm 1): with ``C = E[x x']`` and
``P = (C + lambda I)^-1``, the least squared output error of removing the channels J, all other weights re-fitted, is

    trace( W[:, J] P[J, J]^-1 W[:, J]' )

Each step removes the cheapest block, re-fits the weights, and removes the block's rows and columns from P by a Schur complement. All
removals together cost O(width^3 + width^2 * out). An output metric M, such as the Fisher information of the layer's output, replaces
the squared error by ``e' M e``; it changes the order, not the re-fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.errors import InputError


def removal_order(
    weight_OI: Tensor, second_II: Tensor, block: int = 1, damping: float = 1e-4, metric_OO: Tensor | None = None
) -> tuple[list[int], list[float]]:
    """Returns the blocks in the order of their removal, and the error that each removal adds.

    Args:
        weight_OI: Weights of the layer, (out, in).
        second_II: Second moments of the layer's inputs, float64 (in, in).
        block: Number of adjacent channels that are removed together; a divisor of the width.
        damping: Ridge relative to the mean of the diagonal.
        metric_OO: Symmetric positive semidefinite metric M of the output, (out, out); None for the identity.

    Raises:
        InputError: The block does not divide the width, or the moments are not finite.
    """
    width = second_II.shape[0]
    if block < 1 or width % block:
        raise InputError(f"blocks of {block} channels do not divide a width of {width}; use a divisor")
    if not torch.isfinite(second_II).all():
        raise InputError("activations on the calibration text are not finite; use --dtype float32 or other calibration text")
    weight = weight_OI.to(second_II)
    if metric_OO is not None:
        weight = _root(metric_OO.to(second_II)).T @ weight
    # E|We|^2 depends on W only through W'W, which is the smaller matrix when there are more outputs than inputs.
    if weight.shape[0] > width:
        weight = _root(weight.T @ weight).T
    ridge = damping * second_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped_II = second_II.clone()
    damped_II.diagonal().add_(ridge)
    inverse = torch.linalg.inv(damped_II)
    del damped_II
    return _eliminate(weight.clone(), inverse.add_(inverse.T.clone()).mul_(0.5), block)


def _eliminate(weight: Tensor, inverse: Tensor, block: int) -> tuple[list[int], list[float]]:
    width = inverse.shape[0]
    left = torch.ones(width // block, dtype=torch.bool, device=inverse.device)
    order: list[int] = []
    costs: list[float] = []
    for _ in range(width // block):
        price = _prices(weight, inverse, block).masked_fill(~left, torch.inf)
        unit = int(price.argmin())
        channels = slice(unit * block, (unit + 1) * block)
        solved = torch.linalg.solve(inverse[channels, channels], inverse[channels])
        weight.addmm_(weight[:, channels].clone(), solved, alpha=-1.0)
        inverse.addmm_(inverse[:, channels].clone(), solved, alpha=-1.0)
        # These entries are zero in exact arithmetic. A pivot left by rounding would look cheap, or grow without bound.
        weight[:, channels] = 0.0
        inverse[channels, :] = 0.0
        inverse[:, channels] = 0.0
        inverse[channels, channels] = torch.eye(block, dtype=inverse.dtype, device=inverse.device)
        left[unit] = False
        order.append(unit)
        costs.append(float(price[unit].clamp_min(0.0)))
    return order, costs


def _prices(weight: Tensor, inverse: Tensor, block: int) -> Tensor:
    """Returns the present cost of removing each block."""
    if block == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    units = inverse.shape[0] // block
    squares = inverse.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.view(weight.shape[0], units, block).permute(1, 2, 0)
    return (columns * torch.linalg.solve(squares, columns)).sum(dim=(1, 2))


def _root(matrix: Tensor) -> Tensor:
    """Returns R with R R' equal to a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    return vectors * values.clamp_min(0.0).sqrt()
