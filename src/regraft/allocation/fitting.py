r"""Fit of the performance model to trials of all levels at once.

The loss of a trial, with s the scale of its level and d the discrepancy of the slots' amplitudes at that level, is

.. math::
    \text{loss}(r) &= o_{\text{group}} - s\,[\text{gain}(r) + d_{\text{level}}(r)] + \varepsilon \\
    \log s &= \kappa \log \varphi + e\,[\text{elastic}]

A group is the set of trials with the same kind, fidelity phi and seed: they are paired and share a free offset o. Short recoveries show a
part of the gain, and the slots' amplitudes with a relative error that falls with their length; elastic scores have their own relative
error.

The posterior is a Laplace approximation by Gauss-Newton steps. It is computed in the space of the trials, so that its cost is cubic in
their number and linear in the number of slots. Noise and tau maximise the evidence of the linearised model, times their prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regraft.allocation.concave import CORRECTION, Array, Design, Posterior, correction_kernel, design_of
from regraft.allocation.observations import Observations, observe
from regraft.allocation.prior import Prior
from regraft.plans import RankSpace, RankTrial

_ELASTIC_DISCREPANCY = 0.3  # relative error of a slot's amplitude in elastic scores
_SHORT_DISCREPANCY = 0.3  # relative error of a slot's amplitude in a recovery of zero steps; falls linearly to 0 at a full recovery
_ELASTIC_NOISE = 0.5  # noise of an elastic score, a forward pass on fixed tokens, as a share of a recovery's noise
_NOISES = np.linspace(-2.0, 2.0, 9)  # candidates for the log noise, in prior standard deviations from the prior mean
_SPREADS = np.linspace(-1.5, 1.5, 5)  # candidates for log tau, in prior standard deviations from the prior mean
_ITERATIONS = 15
_REFINED_AT = (0, 2, 5, 8)  # iterations before which noise and tau are chosen again
_LARGEST_STEP = 1.0  # largest change of any parameter in one iteration
_CLOSE = 1e-3


@dataclass(frozen=True, eq=False)
class _Linear:
    """The model linearised at given parameters, with the parts of the trials' covariance.

    Attributes:
        jacobian: (N, P) derivatives of the expected losses.
        target: (N,) part of the losses to be explained by the parameters' deviation from the prior mean.
        scales: (N,) share of a gain that shows in each trial's loss.
        shared: (N, N) covariance due to the shared parameters, half-ranks, offsets, correction and discrepancy.
        spread: (N, N) covariance due to the amplitudes, at tau = 1.
        noise: (N,) variance of the trials, at noise = 1.
        correction_nats: Standard deviation of the correction.
    """

    jacobian: Array
    target: Array
    scales: Array
    shared: Array
    spread: Array
    noise: Array
    correction_nats: float


def fit(space: RankSpace, trials: Sequence[RankTrial], prior: Prior) -> Posterior:
    """Returns the posterior over the gains of all rank vectors, given trials.

    Args:
        space: Space of the search.
        trials: Trials of any levels; failed ones are left out.
        prior: Prior over the shared parameters.
    """
    design, seen = design_of(space, prior), observe(space, trials)
    parameters, noise, spread = design.mean, float(np.exp(prior.log_noise[0])), float(np.exp(prior.log_spread[0]))
    for iteration in range(_ITERATIONS if len(seen) else 0):
        linear = _linearize(design, seen, parameters)
        if iteration in _REFINED_AT:
            noise, spread = _by_evidence(linear, prior)
        covariance = linear.shared + spread**2 * linear.spread + noise**2 * np.diag(linear.noise)
        solved = np.linalg.solve(covariance, linear.target)
        step = design.mean + design.times_covariance(linear.jacobian, spread).T @ solved - parameters
        largest = float(np.abs(step).max())
        parameters = parameters + step * min(1.0, _LARGEST_STEP / max(largest, 1e-300))
        if largest < _CLOSE:
            break
    return _posterior(design, seen, parameters, noise, spread)


def _posterior(design: Design, seen: Observations, parameters: Array, noise: float, spread: float) -> Posterior:
    linear = _linearize(design, seen, parameters)
    covariance = linear.shared + spread**2 * linear.spread + noise**2 * np.diag(linear.noise)
    whitening: Array = np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.float64, copy=False)
    explained = design.times_covariance(linear.jacobian, spread) @ linear.jacobian.T
    values, vectors = np.linalg.eigh(covariance - explained)
    return Posterior(
        design=design,
        parameters=parameters,
        noise_nats=noise,
        spread=spread,
        correction_nats=linear.correction_nats,
        choices=seen.choices,
        jacobian=linear.jacobian,
        scales=linear.scales,
        whitening=whitening,
        rest=vectors * np.sqrt(np.maximum(values, 0.0)),
        weights=whitening.T @ (whitening @ linear.target),
    )


def _linearize(design: Design, seen: Observations, parameters: Array) -> _Linear:
    gains, jacobian = design.gains(parameters, seen.choices)
    log_fidelity = np.log(seen.fidelity)
    scales = np.exp(parameters[2] * log_fidelity + parameters[3] * seen.elastic)
    total = gains.sum(1)
    jacobian[:, 2], jacobian[:, 3] = total * log_fidelity, total * seen.elastic
    jacobian *= -scales[:, None]
    slots, shared = design.slots, design.shared
    amplitudes = jacobian[:, shared : shared + slots]
    spread = amplitudes @ amplitudes.T
    from_shared = design.times_covariance(jacobian, 0.0) @ jacobian.T
    discrepancy = np.where(seen.elastic, _ELASTIC_DISCREPANCY, _SHORT_DISCREPANCY * (1.0 - seen.fidelity))
    same_level = seen.level[:, None] == seen.level[None, :]
    table = design.tables(parameters)[0]
    correction = CORRECTION * float(np.sqrt(table.var(axis=1).sum()))
    kernel = correction_kernel(design.space, seen.choices, seen.choices)
    losses = seen.without_offsets()
    offset = 100.0 * (float(losses.std()) if len(losses) else 0.0) ** 2 + 1e-12
    return _Linear(
        jacobian=jacobian,
        target=losses + scales * total + jacobian @ (parameters - design.mean),
        scales=scales,
        shared=from_shared
        + offset * (seen.group[:, None] == seen.group[None, :])
        + correction**2 * kernel * np.outer(scales, scales)
        + np.where(same_level, np.outer(discrepancy, discrepancy) * spread, 0.0),
        spread=spread,
        noise=np.where(seen.elastic, _ELASTIC_NOISE**2, 1.0),
        correction_nats=correction,
    )


def _by_evidence(linear: _Linear, prior: Prior) -> tuple[float, float]:
    """Returns the noise in nats and tau with the largest evidence of the linearised model times their prior."""
    root = np.sqrt(linear.noise)
    target = linear.target / root
    best = (-np.inf, 0.0, 0.0)
    for spread_at in _SPREADS:
        spread = float(np.exp(prior.log_spread[0] + spread_at * prior.log_spread[1]))
        values, vectors = np.linalg.eigh((linear.shared + spread**2 * linear.spread) / np.outer(root, root))
        squares = (vectors.T @ target) ** 2
        for noise_at in _NOISES:
            noise = float(np.exp(prior.log_noise[0] + noise_at * prior.log_noise[1]))
            variances = np.maximum(values, 0.0) + noise**2
            evidence = -0.5 * float((squares / variances).sum() + np.log(variances).sum() + noise_at**2 + spread_at**2)
            best = max(best, (evidence, noise, spread))
    return best[1], best[2]
