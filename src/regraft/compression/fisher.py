"""A price in nats for every rank: the truncation that moves the model's predictions least, to second order.

Let ``y = W x + b``, ``e = (W' - W) x + b' - b`` the error that a factored layer makes, and ``g`` the gradient at y of the log-likelihood of
tokens that are drawn from the model's own predictions. To second order in e the Kullback-Leibler divergence of the changed predictions from
the old ones is ``1/2 E[(g' e)^2]`` per token, errors at different tokens taken as uncorrelated. With inputs and gradients taken as
independent, as in K-FAC (Martens and Grosse, arXiv 1503.05671, section 3), and a bias that keeps the mean of the outputs, it is

    1/2 tr( G (W - W') C (W - W')' ),     C = Cov(x),  G = E[g g']

whose minimum at rank r truncates ``G^1/2 W C^1/2``: a dropped singular value s costs ``1/2 s^2`` nats per token. Such prices add up
within a layer and compare between layers. With ``G`` the identity and ``C = E[x x']`` this is SVD-LLM.

The mean is worth a bias: a mean error is the same at every token, so that it does not average out over those that a prediction attends to.
``G`` is estimated from one draw for each calibration token, and mixed with a multiple of the identity; what it says of the directions
that matter least is noise.
"""

from __future__ import annotations

from regraft.compression.contract import COMPRESSORS, Compressor, Evidence
from regraft.numerics.truncation import Truncation, truncation

DAMPING = 0.1


def truncate(evidence: Evidence) -> Truncation:
    """Decomposes ``G^1/2 W C^1/2``; a dropped singular value s costs s^2 / 2 nats of divergence per token."""
    mean_I = evidence.seen().mean_D
    return truncation(evidence.weight_OI, evidence.covariance(), evidence.fisher(DAMPING), scale=0.5, mean_I=mean_I)


COMPRESSORS.include(Compressor("fisher", looks_at="gradients", unit="nats", adds_bias=True, truncate=truncate))
