r"""The performance model: the sum of a concave gain for every slot, plus a correction, with an uncertainty for every rank vector.

.. math::
    \text{gain}(r) &= \sum_l e^{\eta_l}\,\bigl[h(r_l; \rho_l) - h(u; \rho_l)\bigr] + c(r) \\
    \eta_l &= \mu - \log L + \beta^\top x_l + a_l, \quad a_l \sim N(0, \tau^2) \\
    \log \rho_l &= \lambda + b_l, \quad b_l \sim N(0, \omega^2)

The gain, in nats, is the loss of the uniform vector u minus that of r after a full recovery. h is r / (r + rho), shifted and scaled to
run from 0 at the smallest choice to 1 at the largest. It rises and is concave for every rho: each step up helps, by less than the step
before. x_l are the slot's standardised features. c is a Gaussian process over rank vectors, for the part of the gain that is not a sum
over slots.

This departs from arXiv 2406.15734, whose performance model is a network on the ranks alone (:mod:`regraft.allocation.perceptron`).
:mod:`regraft.allocation.fitting` fits the model to trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.allocation.contract import Ranks
from regraft.allocation.features import standardized
from regraft.allocation.observations import stacked
from regraft.allocation.prior import BASE_NAMES, Prior
from regraft.plans import RankSpace

Array = NDArray[np.float64]

HALF_RANK_SPREAD = 0.6  # omega: the half-ranks of the slots differ by about a factor of two
CORRECTION = 0.2  # standard deviation of the correction, as a share of that of the sum of gains


@dataclass(frozen=True, eq=False)
class Design:
    """The performance model of a space before any trial: features, prior and layout of the parameters.

    The parameters are one vector: the four of ``BASE_NAMES``, the coefficients, then all a_l and all b_l.
    """

    space: RankSpace
    features: Array  # (L, F)
    mean: Array  # (P,) prior mean
    shared_covariance: Array  # (G, G) prior covariance of the shared parameters

    @property
    def shared(self) -> int:
        """Number of parameters that all slots share."""
        return len(self.shared_covariance)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.features)

    def times_covariance(self, jacobian: Array, spread: float) -> Array:
        """Returns the product of a Jacobian and the prior covariance of the parameters, (N, P)."""
        shared, slots = self.shared, self.slots
        return np.concatenate(
            [
                jacobian[:, :shared] @ self.shared_covariance,
                jacobian[:, shared : shared + slots] * spread**2,
                jacobian[:, shared + slots :] * HALF_RANK_SPREAD**2,
            ],
            axis=1,
        )

    def tables(self, parameters: Array) -> tuple[Array, Array]:
        """Returns the gain of every choice over the uniform rank, (L, C), and its derivative by the log half-rank, (L, C)."""
        shared, slots = self.shared, self.slots
        log_gain = parameters[0] - np.log(slots) + self.features @ parameters[len(BASE_NAMES) : shared]
        amplitude = np.exp(np.clip(log_gain + parameters[shared : shared + slots], -30.0, 10.0))[:, None]
        half = np.exp(parameters[1] + parameters[shared + slots :])[:, None]
        ranks = np.array(self.space.choices, dtype=np.float64)[None, :]
        low, high = ranks[:, :1], ranks[:, -1:]
        # h = (r - low)(high + rho) / ((r + rho)(high - low)); the derivative by log rho is rho times that by rho.
        share = (ranks - low) * (high + half) / ((ranks + half) * (high - low))
        slope = half * (ranks - low) * (ranks - high) / ((ranks + half) ** 2 * (high - low))
        uniform = self.space.choices.index(self.space.uniform)
        return amplitude * (share - share[:, uniform : uniform + 1]), amplitude * (slope - slope[:, uniform : uniform + 1])

    def gains(self, parameters: Array, choices: NDArray[np.int64]) -> tuple[Array, Array]:
        """Returns the gain of every slot of N vectors, (N, L), and the Jacobian of the sums over slots, (N, P)."""
        table, slope = self.tables(parameters)
        slots = np.arange(self.slots)
        gains, slopes = table[slots, choices], slope[slots, choices]
        total = gains.sum(1, keepdims=True)
        unscaled = np.zeros((len(choices), 2))
        return gains, np.concatenate([total, slopes.sum(1, keepdims=True), unscaled, gains @ self.features, gains, slopes], axis=1)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Posterior over the gains of all rank vectors after N trials.

    Attributes:
        design: The model and its prior.
        parameters: (P,) the most probable parameters.
        noise_nats: Standard deviation of one recovery.
        spread: tau, the spread of the log amplitudes that the features do not explain.
        correction_nats: Standard deviation of the correction.
        choices: (N, L) the vectors of the trials, as indices of the choices.
        jacobian: (N, P) derivatives of the trials' expected losses.
        scales: (N,) the share of a gain that shows in each trial's loss.
        whitening: (N, N) inverse of the Cholesky factor of the trials' covariance.
        rest: (N, N) Cholesky factor of the part of that covariance that the parameters do not explain.
        weights: (N,) the product of the inverse covariance and the linearised losses.
    """

    design: Design
    parameters: Array
    noise_nats: float
    spread: float
    correction_nats: float
    choices: NDArray[np.int64]
    jacobian: Array
    scales: Array
    whitening: Array
    rest: Array
    weights: Array

    def table(self) -> Array:
        """Returns the most probable gain of every choice over the uniform rank, (L, C), without the correction."""
        return self.design.tables(self.parameters)[0]

    def moments(self, ranks: Sequence[Ranks]) -> tuple[Array, Array]:
        """Returns mean (M,) and covariance (M, M), in nats, of the gains of M vectors over uniform after a full recovery."""
        choices = stacked(self.design.space, ranks)
        gains, jacobian = self.design.gains(self.parameters, choices)
        times = self.design.times_covariance(jacobian, self.spread)
        variance = self.correction_nats**2
        correction = -variance * correction_kernel(self.design.space, choices, self.choices) * self.scales
        prior = times @ jacobian.T + variance * correction_kernel(self.design.space, choices, choices)
        reduced = (times @ self.jacobian.T + correction) @ self.whitening.T
        return gains.sum(1) + correction @ self.weights, prior - reduced @ reduced.T

    def shared(self) -> tuple[Array, Array]:
        """Returns mean (G,) and covariance (G, G) of the parameters that all slots share."""
        count = self.design.shared
        explained = self.whitening @ self.jacobian[:, :count] @ self.design.shared_covariance
        return self.parameters[:count], self.design.shared_covariance - explained.T @ explained

    def scale(self, fidelity: Array) -> Array:
        """Returns the share of a gain that shows after real recoveries of M fidelities, (M,)."""
        return np.exp(self.parameters[2] * np.log(fidelity))

    def draw_tables(self, generator: np.random.Generator, count: int) -> list[Array]:
        """Returns draws from the posterior of the gains of every choice, each (L, C), without the correction.

        A draw follows Matheron's rule: a draw from the prior, corrected by the residuals of the trials.
        """
        design = self.design
        shared = np.linalg.cholesky(design.shared_covariance + 1e-12 * np.eye(design.shared))
        deviations = np.concatenate([np.full(design.slots, self.spread), np.full(design.slots, HALF_RANK_SPREAD)])
        times = design.times_covariance(self.jacobian, self.spread)
        drawn: list[Array] = []
        for _ in range(count):
            common = shared @ generator.standard_normal(design.shared)
            start = np.concatenate([common, deviations * generator.standard_normal(2 * design.slots)])
            losses = self.jacobian @ start + self.rest @ generator.standard_normal(len(self.choices))
            step = start - times.T @ (self.whitening.T @ (self.whitening @ losses))
            drawn.append(design.tables(self.parameters + np.clip(step, -3.0, 3.0))[0])
        return drawn


def design_of(space: RankSpace, prior: Prior) -> Design:
    """Returns the model of a space before any trial."""
    features = standardized(space)
    mean, covariance = prior.over(tuple(features))
    slots = len(space.slots)
    matrix = np.stack(list(features.values()), axis=1)
    return Design(space, matrix, np.concatenate([mean, np.zeros(2 * slots)]), covariance)


def correction_kernel(space: RankSpace, left: NDArray[np.int64], right: NDArray[np.int64]) -> Array:
    """Returns the covariance of the correction between two sets of vectors, (M, N), in units of its variance at random vectors.

    It is a squared exponential in the mean squared difference of the ranks, conditioned on zero correction at the uniform vector.
    """
    places = np.linspace(-1.0, 1.0, len(space.choices))
    uniform = np.full((1, len(space.slots)), places[space.choices.index(space.uniform)])

    def plain(a: Array, b: Array) -> Array:
        squares = (a**2).mean(1)[:, None] + (b**2).mean(1)[None, :] - 2.0 * (a @ b.T) / len(space.slots)
        return np.exp(-0.5 * np.maximum(squares, 0.0) / 0.7**2)

    a, b = places[left], places[right]
    return plain(a, b) - plain(a, uniform) - plain(uniform, b) + 1.0
