"""Completion of a matrix from exact entries, by the compressed dynamics with scale, step size and start chosen automatically.

References:
    [YAR24] Yaras, Wang, Balzano, Qu, arXiv 2406.04112, section 3 (deep matrix completion).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.completion.descent import Descent, OptimizerName, automatic_step, descend
from regraft.completion.entries import EntryList
from regraft.completion.spectral import Factors
from regraft.errors import TrainingError
from regraft.numerics.chain import Chain, compressed_start
from regraft.numerics.checks import checked_count, checked_number, checked_rank
from regraft.numerics.frames import compact_frames
from regraft.numerics.svd import factored_triplets

TOP_VALUE = 300.0
"""Values are scaled so that the matrix has about this top singular value s. The outer factors converge at a rate of gamma s^2, the
inner ones at L s^(2 - 2/L); at gamma = 0.01 and L = 3 this value brings the two together."""

HALVINGS = 8
"""How often a step size that diverged is halved: masks that show some rows far more than others have more curvature than
:func:`automatic_step` assumes."""

Look = Callable[[int, Factors], bool]
"""Called with the iteration and the present factors; returning True stops the descent."""


@dataclass(frozen=True)
class ExactSettings:
    """Settings of an exact completion.

    Attributes:
        depth: L, at least 2.
        init_scale: Epsilon, for a top singular value of 300. None chooses 1e-3 for depth 2, 0.01 for depth 3, and for deeper chains
            0.01^(1 / (L - 2)), the scale at which the first component grows as slowly as at depth 3. On an 80 x 80 matrix of rank 3,
            30 % observed, depth 3, the same error takes 8,958 iterations at 1e-3 and 1,176 at 0.01. At 0.1, and at depth 2 from 0.01
            up, components beyond the rank of the matrix start too large and do not die out.
        gamma: Rate of the outer factors.
        optimizer: Optimizer; momentum needs a tenth of the iterations of plain descent, at the same step size.
        tolerance: Relative squared error on the observed entries at which the descent stops.
        max_iterations: Largest number of steps.
        watch_every: Iterations between two calls of ``look``.
    """

    depth: int = 3
    init_scale: float | None = None
    gamma: float = 0.01
    optimizer: OptimizerName = "momentum"
    tolerance: float = 1e-12
    max_iterations: int = 20_000
    watch_every: int = 25

    def __post_init__(self) -> None:
        checked_count(self.depth, "depth", 2)
        checked_number(self.gamma, "gamma")
        checked_count(self.max_iterations, "max iterations")
        if self.init_scale is not None:
            checked_number(self.init_scale, "init scale", above=True)

    @property
    def scale(self) -> float:
        """Scale of the start, epsilon, with None resolved."""
        if self.init_scale is not None:
            return self.init_scale
        return 1e-3 if self.depth == 2 else 0.01 ** (1 / (self.depth - 2))


@dataclass(frozen=True)
class ExactOutcome:
    """A completed matrix and the course of its descent.

    Attributes:
        factors: The ``rank`` leading components.
        iterations: Number of steps made.
        loss: Relative squared error on the observed entries, before the factors were cut to the leading components.
        step_size: The step size that did not diverge, for scaled values.
    """

    factors: Factors
    iterations: int
    loss: float
    step_size: float


def complete_exactly(
    entries: EntryList, rank: int, settings: ExactSettings, generator: torch.Generator, look: Look | None = None
) -> ExactOutcome:
    """Completes a matrix by the compressed dynamics, without shrinkage.

    Args:
        entries: The known entries.
        rank: r. The factorization is 2r wide; the result keeps its r leading components.
        settings: Depth, rates and stopping rule.
        generator: A generator on the CPU.
        look: Called every ``settings.watch_every`` iterations; it may stop the descent.

    Raises:
        InputError: The rank does not fit.
        TrainingError: Every step size tried diverged.
    """
    checked_rank(rank, entries.shape[0], entries.shape[1])
    triplets = entries.top_triplets(rank, generator)
    top = float(triplets.values[0]) / entries.share
    if top == 0:
        none = Factors(torch.zeros_like(triplets.left), torch.zeros_like(triplets.right))
        return ExactOutcome(none, 0, 0.0, 0.0)
    unit = top / TOP_VALUE
    scaled = entries.with_values(entries.values / unit)
    start = compressed_start(compact_frames(triplets, generator), settings.depth, settings.scale, settings.gamma)
    step = automatic_step(TOP_VALUE * entries.share, entries.share, settings.depth, settings.gamma)
    if settings.optimizer == "adam":
        step = 0.01 * TOP_VALUE ** (1 / settings.depth)  # Adam's steps have the size of the factors' entries, not of gradients

    def watch(iteration: int, chain: Chain, loss: float) -> bool:
        return look is not None and look(iteration, _leading(chain, rank, unit))

    for attempt in range(HALVINGS + 1):
        descent = Descent(
            step / 2**attempt,
            settings.optimizer,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
            watch_every=settings.watch_every,
        )
        try:
            done = descend(start, scaled, descent, watch)
        except TrainingError:
            continue
        return ExactOutcome(_leading(done.chain, rank, unit), done.iterations, done.loss, descent.step_size)
    raise TrainingError(
        f"the completion diverged at every step size from {step:.3g} down to {step / 2**HALVINGS:.3g}; "
        "look for extreme values among the entries, or lower gamma"
    )


def _leading(chain: Chain, rank: int, unit: float) -> Factors:
    """Returns the leading components of a chain, in the units of the entries."""
    found = factored_triplets(chain.left(), chain.factors[0].T)
    left: Tensor = unit * found.left[:, :rank] * found.values[:rank]
    return Factors(left, found.right[:, :rank])
