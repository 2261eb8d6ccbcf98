"""Least-squares weights for a layer that has lost some of its input channels.

With ``C = E[x x']`` over calibration activations and S the kept channels, the weights of least mean squared error are

    W' = W C[:, S] (C[S, S] + lambda I)^-1

(the normal equations of OSSCAR, arXiv 2403.12983, and ZipLM, arXiv 2302.04089). The damping is relative to the mean of the diagonal of
``C[S, S]`` and pulls towards the kept columns of W themselves, so that too much of it gives plain pruning and not zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics.moments import Moments

DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def reconstruct(weight_OI: Tensor, second_II: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Returns the weights on the kept channels.

    Args:
        weight_OI: Weights before, (out, in).
        second_II: Second moments of the inputs, float64 (in, in).
        kept: Indices of the channels that stay, int64 (kept,), ascending.
        damping: Relative ridge, > 0.

    Returns:
        float64 (out, kept).

    Raises:
        InputError: The second moments are not finite.
    """
    if not torch.isfinite(second_II).all():
        raise InputError("activations on the calibration text are not finite; use --dtype float32 or other calibration text")
    weight = weight_OI.to(second_II)
    cross_IS = second_II[:, kept]
    gram_SS = cross_IS[kept]
    ridge = damping * gram_SS.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    right_SO = (weight @ cross_IS + ridge * weight[:, kept]).T
    damped = gram_SS + ridge * torch.eye(len(kept), dtype=gram_SS.dtype, device=gram_SS.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:  # the damping is below the rounding of the moments
        return torch.linalg.lstsq(damped, right_SO, driver=None).solution.T
    return torch.cholesky_solve(right_SO, factor).T


def error(weight_OI: Tensor, second_II: Tensor, kept: Tensor, new_OS: Tensor) -> float:
    """Returns the mean squared error ``E |W x - W' x_S|^2`` of new weights on inputs of these second moments."""
    difference = weight_OI.to(second_II).clone()
    difference[:, kept] -= new_OS
    return float(torch.einsum("oi,ij,oj->", difference, second_II, difference))


def choose_damping(weight_OI: Tensor, fit: Moments, held_out: Moments, kept: Tensor, dampings: Sequence[float] = DAMPINGS) -> float:
    """Returns the damping whose weights, fitted on one part of the calibration text, do best on the other."""
    second_II, judge_II = fit.second_DD, held_out.second_DD
    return min(dampings, key=lambda damping: error(weight_OI, judge_II, kept, reconstruct(weight_OI, second_II, kept, damping)))
