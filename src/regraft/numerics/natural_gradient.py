"""Natural gradient of a linear layer, with the Fisher information as the Kronecker product of two small matrices.

For ``y = W x`` and ``g`` the gradient of the log-likelihood in ``y``, K-FAC takes the Fisher information of ``W`` to be ``C (x) M`` with
``C = E[x x']`` and ``M = E[g g']`` (Martens and Grosse, arXiv 1503.05671, section 3). The natural gradient of a loss with gradient ``G`` is
then ``M^-1 G C^-1``: two solves, of sizes out and in, instead of one of size out * in. Each factor is damped by a share of the mean of
its diagonal, which is the paper's factored Tikhonov damping (section 6.3) with a relative strength.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.numerics import linalg

DAMPING = 0.1


def natural_gradient(gradient_OI: Tensor, inputs_II: Tensor, outputs_OO: Tensor, damping: float = DAMPING) -> Tensor:
    """Returns ``M^-1 G C^-1``, float64 (out, in).

    Args:
        gradient_OI: Gradient of the mean loss, (out, in).
        inputs_II: Second moments C of the layer's inputs, (in, in).
        outputs_OO: Second moments M of the gradients with respect to the layer's outputs, (out, out).
        damping: Number added to each diagonal, relative to the mean of the diagonal; above 0.

    Raises:
        InputError: The gradient or a second moment is not finite.
    """
    gradient = gradient_OI.double()
    if not (torch.isfinite(gradient).all() and torch.isfinite(inputs_II).all() and torch.isfinite(outputs_OO).all()):
        raise InputError(
            "gradients on the calibration text are not finite; use `dtype=float32`, `reconstruct=least_squares` or other calibration text"
        )
    left = torch.cholesky_solve(gradient, _factor(outputs_OO, damping))
    return torch.cholesky_solve(left.T, _factor(inputs_II, damping)).T


def _factor(moments: Tensor, damping: float) -> Tensor:
    """Returns the Cholesky factor of the damped moments, or of the identity when all are zero (then the gradient is zero too)."""
    damped = moments.double().clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    if not damped.any():
        damped.diagonal().fill_(1.0)
    return linalg.cholesky(damped)
