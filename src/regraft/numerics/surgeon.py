"""The order in which blocks of input channels leave a linear layer when every removal is made good by least squares.

Optimal Brain Surgeon for structures (Hassibi and Stork 1993; ZipLM, arXiv 2302.04089, algorithm 1): with ``C = E[x x']`` and
``P = (C + lambda I)^-1``, the least squared output error of removing the channels J, all other weights re-fitted, is

    trace( P[J, J]^-1 A[J, J] ),    A = W' M W

for an output metric M: the identity for the plain squared error, or half the Fisher information of the layer's output, which makes the
error the Kullback-Leibler divergence of the model's predictions to second order, in nats (LLM Surgeon, arXiv 2312.17244). The
metric changes the order and the price, not the re-fit. The cheapest block goes, the weights are re-fitted, and with them A changes; P
loses its rows and columns by a Schur complement; and so on.

Single channels leave in panels, as in a blocked Cholesky factorization with pivots: within a panel only the columns that are asked for
are brought up to date, from the panel's own vectors, and both matrices are updated once at its end, by matrix products, with what has left
taken out of them. All removals together cost about two products of (width, width) matrices and the inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg

DAMPING = 1e-4
_PANEL = 48


def removal_order(
    weight_OI: Tensor, second_II: Tensor, block: int = 1, damping: float = DAMPING, metric_OO: Tensor | None = None
) -> tuple[list[int], list[float]]:
    """Returns the blocks in the order in which they leave, and the error that each removal adds.

    Args:
        weight_OI: Weights of the layer, (out, in).
        second_II: Second moments of its inputs, float64 (in, in).
        block: Adjacent channels that leave together; divides the width.
        damping: Ridge relative to the mean of the diagonal.
        metric_OO: Symmetric positive semidefinite metric of the output, (out, out); None for the identity.

    Raises:
        InputError: The block does not divide the width, or the moments are not finite.
    """
    width = second_II.shape[0]
    if block < 1 or width % block:
        raise InputError(f"blocks of {block} channels do not divide a width of {width}; use a divisor")
    weight = weight_OI.to(second_II)
    squares_II = weight.T @ (weight if metric_OO is None else metric_OO.to(second_II) @ weight)
    if not (torch.isfinite(second_II).all() and torch.isfinite(squares_II).all()):
        raise InputError("activations on the calibration text are not finite; use `dtype=float32` or other calibration text")
    ridge = damping * second_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped_II = second_II.clone()
    damped_II.diagonal().add_(ridge)
    inverse_II = linalg.inverse_of_positive(damped_II)
    if inverse_II is None:  # silent inputs, or rounding errors larger than the ridge
        inverse_II = linalg.inverse(damped_II)
        inverse_II = inverse_II.add_(inverse_II.T.clone()).mul_(0.5)
    return _one_by_one(squares_II, inverse_II) if block == 1 else _blockwise(squares_II, inverse_II, block)


def _one_by_one(squares_II: Tensor, inverse_II: Tensor) -> tuple[list[int], list[float]]:
    """Removes single channels, panel after panel, from ``A = W' M W`` and P; both are overwritten."""
    left = torch.arange(inverse_II.shape[0], device=inverse_II.device)
    gone = torch.zeros_like(left, dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    here = len(left)
    while here:
        places, paid = _panel(squares_II, inverse_II, gone, min(_PANEL, here))
        order += left[places].cpu().numpy().tolist()
        costs += paid
        here -= len(places)
        if 4 * here <= 3 * len(left):  # rows of what has left are carried along until they are worth a copy
            stay = (~gone).nonzero().squeeze(1)
            left, gone = left[stay], gone[stay]
            squares_II, inverse_II = squares_II[stay[:, None], stay], inverse_II[stay[:, None], stay]
    return order, costs


def _panel(squares_II: Tensor, inverse_II: Tensor, gone: Tensor, size: int) -> tuple[list[int], list[float]]:
    """Removes ``size`` channels: returns their places and what each cost, marks them in ``gone``, and updates both matrices in place.

    In steps 0 to k, with ``l = P_j / sqrt(P_jj)`` the scaled column of what leaves and ``u`` its scaled weights: ``P - L L'`` and
    ``W - U L'`` are what is left. ``H = W' M U`` and ``K = U' M U`` stand for U, which is never formed. Columns of L and H are rows here,
    and columns of the symmetric matrices are read as rows, which lie together in memory.
    """
    width = len(inverse_II)
    l_KI, h_KI = inverse_II.new_zeros(size, width), inverse_II.new_zeros(size, width)
    k_KK = inverse_II.new_zeros(size, size)
    variances_I, norms_I = inverse_II.diagonal().clone(), squares_II.diagonal().clone()
    places: list[int] = []
    costs: list[float] = []
    for step in range(size):
        prices = (norms_I / variances_I).masked_fill_(gone, torch.inf)
        unit = int(prices.argmin())
        costs.append(max(0.0, float(prices[unit])))
        places.append(unit)
        gone[unit] = True
        before = slice(0, step)
        own_K, root = l_KI[before, unit].clone(), variances_I[unit].sqrt()
        l_I = inverse_II[unit].addmv(l_KI[before].T, own_K, alpha=-1.0).div_(root)
        h_I = squares_II[unit].addmv(h_KI[before].T, own_K, alpha=-1.0).div_(root)
        # What the columns before have taken from this one's products: (U'M u) of the steps so far, and (W - U L')' M u of all channels.
        k_K = (h_KI[before, unit] - k_KK[before, before] @ own_K).div_(root)
        own = (h_I[unit] - own_K @ k_K) / root
        products_I = h_I.addmv(l_KI[before].T, k_K, alpha=-1.0)
        norms_I.addcmul_(l_I, products_I, value=-2.0).addcmul_(l_I, l_I * own).clamp_min_(0.0)
        variances_I.addcmul_(l_I, l_I, value=-1.0)
        # A pivot that rounding left behind would look cheap or explode.
        variances_I.clamp_min_(torch.finfo(torch.float64).tiny)
        l_KI[step], h_KI[step] = l_I, h_I
        k_KK[step, before] = k_K
        k_KK[before, step] = k_K
        k_KK[step, step] = own
    half_KI = h_KI.addmm_(k_KK, l_KI, alpha=-0.5)
    squares_II.addmm_(half_KI.T, l_KI, alpha=-1.0).addmm_(l_KI.T, half_KI, alpha=-1.0)
    inverse_II.addmm_(l_KI.T, l_KI, alpha=-1.0)
    return places, costs


def _blockwise(squares_II: Tensor, inverse_II: Tensor, block: int) -> tuple[list[int], list[float]]:
    """Removes blocks of channels, one after another."""
    left = list(range(inverse_II.shape[0] // block))
    order: list[int] = []
    costs: list[float] = []
    while left:
        prices = _prices(squares_II, inverse_II, block)
        place = int(prices.argmin())
        order.append(left.pop(place))
        costs.append(float(prices[place].clamp_min(0.0)))
        here = slice(place * block, (place + 1) * block)
        solved_BI = linalg.solve(inverse_II[here, here], inverse_II[here])
        cross_II = squares_II[:, here] @ solved_BI
        stays = torch.ones(len(inverse_II), dtype=torch.bool, device=inverse_II.device)
        stays[here] = False
        squares_II = (squares_II - cross_II - cross_II.T + solved_BI.T @ squares_II[here, here] @ solved_BI)[stays][:, stays]
        inverse_II = (inverse_II - inverse_II[:, here] @ solved_BI)[stays][:, stays]
    return order, costs


def _prices(squares_II: Tensor, inverse_II: Tensor, block: int) -> Tensor:
    """Returns what the removal of each block would cost now, ``trace(P_JJ^-1 A_JJ)``."""
    units = len(inverse_II) // block

    def squares(matrix_II: Tensor) -> Tensor:
        return matrix_II.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    return linalg.solve(squares(inverse_II), squares(squares_II)).diagonal(dim1=1, dim2=2).sum(dim=1)
