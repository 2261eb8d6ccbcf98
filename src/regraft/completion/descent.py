"""Gradient descent, momentum and Adam on a chain of factors, with the discrepant rates of the compressed factorization.

The loss is ||P(f - M)||_F^2 / 2, the sum over observed entries; a step size quoted for the mean over all m n entries (5e3 at
m = n = 1000) is that of the sum times m n (5e-3).

References:
    [YAR24] Yaras, Wang, Balzano, Qu, arXiv 2406.04112, sections 2 and 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regraft.completion.entries import Observed
from regraft.completion.updates import Adam, HeavyBall, Moved, Update
from regraft.errors import InputError, TrainingError
from regraft.numerics.chain import Chain, gradients
from regraft.numerics.checks import checked_count, checked_number

OptimizerName = Literal["gd", "momentum", "adam"]

Watch = Callable[[int, Chain, float], bool]
"""Called with the iteration, the chain before its step and the relative loss; returning True stops the descent."""

DIVERGED = 1e3
"""Relative loss above which a descent counts as diverged; a start near zero has a relative loss of 1."""


@dataclass(frozen=True)
class Descent:
    """Settings of a descent.

    Attributes:
        step_size: Eta, for the loss as a sum over observed entries.
        optimizer: ``gd``, ``momentum`` (heavy ball: v <- momentum v + gradient, W <- W - eta v) or ``adam``.
        momentum: Momentum of heavy ball, or Adam's first-moment decay.
        weight_decay: Lambda, added to the gradient as lambda W; the outer frames have no decay.
        max_iterations: Largest number of steps.
        tolerance: Stop at ||P(f - M)||^2 / ||P(M)||^2 <= tolerance.
        watch_every: Iterations between two calls of the watch.
    """

    step_size: float
    optimizer: OptimizerName = "gd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_iterations: int = 100_000
    tolerance: float = 1e-12
    watch_every: int = 100

    def __post_init__(self) -> None:
        checked_number(self.step_size, "step size", above=True)
        checked_number(self.momentum, "momentum")
        checked_number(self.weight_decay, "weight decay")
        checked_number(self.tolerance, "tolerance")
        checked_count(self.max_iterations, "max iterations", 0)
        checked_count(self.watch_every, "watch every")
        if self.momentum >= 1:
            raise InputError(f"momentum {self.momentum:g} is not below 1; give one in [0, 1)")
        if self.optimizer not in ("gd", "momentum", "adam"):
            raise InputError(f"unknown optimizer '{self.optimizer}'; known: adam, gd, momentum")


@dataclass(frozen=True)
class Outcome:
    """End point of a descent.

    Attributes:
        chain: The factors.
        iterations: Number of steps made.
        loss: Relative loss ||P(f - M)||^2 / ||P(M)||^2.
        converged: Whether the tolerance was reached.
        seconds: Wall-clock time.
        losses: (iteration, relative loss) at every call of the watch and at the end.
    """

    chain: Chain
    iterations: int
    loss: float
    converged: bool
    seconds: float
    losses: tuple[tuple[int, float], ...]


class Stepper:
    """A descent that makes one step at a time, on a copy of a chain.

    Args:
        chain: The start; it is not changed.
        observed: The entries to fit.
        descent: Optimizer, step size and decay.

    Attributes:
        chain: The factors after the last step.
        gradients: After :meth:`loss`, the gradients of the factors that move (rate above 0), first to last.
    """

    def __init__(self, chain: Chain, observed: Observed, descent: Descent) -> None:
        if chain.shape != observed.shape:
            raise InputError(f"the factors make a {chain.shape} matrix, the data are {observed.shape}; build them for one shape")
        self.chain = chain.clone()
        self.gradients: list[Tensor] = []
        self._observed = observed
        self._update = _update(self.chain, descent)
        self._norm = observed.squared_norm or 1.0

    def loss(self) -> float:
        """Evaluates the relative loss and leaves the gradients in place for :meth:`step`."""
        chain = self.chain
        pull = self._observed.pull(chain.left(), chain.factors[0], need_first=chain.rates[0] != 0)
        self.gradients = [found for found in gradients(chain, pull.d_left, pull.d_first) if found is not None]
        return pull.squared_error / self._norm

    def step(self) -> None:
        """Moves every factor along the gradients of the last :meth:`loss`; call ``loss`` again before the next step."""
        self._update.apply(self.gradients)


def descend(chain: Chain, observed: Observed, descent: Descent, watch: Watch | None = None) -> Outcome:
    """Fits a chain to the observed entries of a matrix.

    Args:
        chain: The start; it is not changed.
        observed: A matrix, or some entries of one.
        descent: Optimizer, step size and stopping rule.
        watch: Called every ``descent.watch_every`` iterations; it may stop the descent.

    Raises:
        TrainingError: The loss is not finite or above :data:`DIVERGED`: the step size is too large.
    """
    stepper = Stepper(chain, observed, descent)
    started = time.perf_counter()
    losses: list[tuple[int, float]] = []
    iteration, converged = 0, False
    while True:
        loss = stepper.loss()
        if not math.isfinite(loss) or loss > DIVERGED:
            raise TrainingError(
                f"the descent diverged at iteration {iteration} (relative loss {loss:.3g}); lower the step size "
                f"{descent.step_size:g}, or gamma {chain.rates[0]:g} of a compressed factorization"
            )
        converged = loss <= descent.tolerance
        last = converged or iteration >= descent.max_iterations
        if last or iteration % descent.watch_every == 0:
            losses.append((iteration, loss))
            last = bool(watch and watch(iteration, stepper.chain, loss)) or last
        if last:
            break
        stepper.step()
        iteration += 1
    return Outcome(stepper.chain, iteration, loss, converged, time.perf_counter() - started, tuple(losses))


def automatic_step(top_value: float, share: float, depth: int, gamma: float = 0.0, safety: float = 0.5) -> float:
    """Returns a step size from the largest curvature at the solution.

    At a balanced solution with top singular value s, the inner factors have curvature depth * s^(2 - 2/depth) and the outer two,
    at rate gamma, gamma * 2 * s^2; a random mask that shows a share p of the entries scales both by p. The top value of the
    masked matrix is p * s. Descent is stable below 2 / curvature.

    Args:
        top_value: Largest singular value of the observed matrix, zero where it is not observed.
        share: p, in (0, 1].
        depth: L.
        gamma: Rate of the outer factors; 0 for a full or narrow chain.
        safety: Product of step size and curvature.
    """
    top = top_value / share
    curvature = share * (depth * top ** (2 - 2 / depth) + 2 * gamma * top**2)
    return safety / max(curvature, torch.finfo(torch.float64).tiny)


def _update(chain: Chain, descent: Descent) -> Update:
    last = len(chain.factors) - 1
    moved: list[Moved] = []
    for index, (factor, rate) in enumerate(zip(chain.factors, chain.rates, strict=True)):
        outer = chain.frames and index in (0, last)
        if rate:
            moved.append(Moved(factor, rate * descent.step_size, 0.0 if outer else descent.weight_decay))
    if descent.optimizer == "adam":
        return Adam(moved, descent.momentum)
    return HeavyBall(moved, descent.momentum if descent.optimizer == "momentum" else 0.0)
