"""The performance model of RankAdaptor (arXiv 2406.15734): a network of five layers from normalised ranks to the loss.

The network has an input layer, three hidden layers of 32 units with ReLU, and one output; it is trained by Adam on the mean squared error.
The three phases have the paper's names. *Initialisation* measures eight random vectors. *Incremental learning* draws 64 vectors, measures
the one with the best prediction and trains the network again, up to eight times. *Convergence* ends that early when predicted and
measured loss are close. The result is the best measured vector. The method is provided for comparison;
:class:`regraft.allocation.rankadaptor.RankAdaptor` is the default.

Departures from the paper: the budget is a hard limit on parameters (paper: a set of ranks, no budget); the target is the held-out loss
(paper: the score of a task), standardised because Adam's steps have a fixed scale; and uniform is one of the first eight vectors. As in
the paper, layers that were not pruned keep the uniform rank.
"""

# torch and NumPy's bridge to it are only partly typed: what they leave unknown is not ours to mend.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.allocation.contract import ALLOCATORS, Learner, Prediction, Proposal, Ranks, refuse_prior
from regraft.allocation.features import SHARE_PRUNED, has_plain, plain
from regraft.allocation.fill import choice_allowed, fill
from regraft.allocation.paired import paired_gains
from regraft.allocation.prior import Prior
from regraft.allocation.uniform import uniform
from regraft.allocation.validation import cross_validate
from regraft.plans import CrossValidation, RankSpace, RankTrial

Phase = Literal["initialisation", "incremental learning", "convergence"]

_HIDDEN = (32, 32, 32)
_STEPS, _RATE = 400, 1e-2
_NETWORK_SEED = 0  # seed of the initial weights, the same in every refit, so that only the trials change the result


@final
@dataclass(frozen=True)
class PaperRankAdaptor:
    """The learner with the performance model of the paper.

    Attributes:
        initial: Number of vectors in the first phase, uniform included.
        candidates: Number of vectors drawn in each round of the second phase.
        rounds: Largest number of rounds of the second phase.
        close_nats: Convergence is reached when predicted and measured gain of the last proposal differ by less than this.
        name: Name of the method on the command line.
        learns_from_scores: False: the network uses no elastic scores.
    """

    initial: int = 8
    candidates: int = 64
    rounds: int = 8
    close_nats: float = 1e-4
    name: str = field(default="rankadaptor-paper")
    learns_from_scores: bool = False

    def starting_from(self, prior: Prior) -> Learner:
        """Refuses every prior: a network on rank vectors alone cannot be transferred to a model with other layers."""
        refuse_prior(self.name)

    def phase(self, space: RankSpace, history: Sequence[RankTrial]) -> Phase:
        """Returns the phase that comes next."""
        measured = list(dict.fromkeys(trial.ranks for trial in history if trial.kind == "recovery"))
        if len(measured) < self.initial:
            return "initialisation"
        if len(measured) >= self.initial + self.rounds:
            return "convergence"
        gains = paired_gains(space, history)
        last = measured[-1]
        if len(measured) > self.initial and last in gains:
            before = [trial for trial in history if trial.ranks != last]
            if abs(float(self.predict(space, before, [last]).gain_nats[0]) - gains[last]) < self.close_nats:
                return "convergence"
        return "incremental learning"

    def propose(
        self,
        space: RankSpace,
        history: Sequence[RankTrial],
        count: int,
        generator: np.random.Generator,
        pending: Sequence[Ranks] = (),
    ) -> tuple[Proposal, ...]:
        """Returns uniform and random vectors in the first phase, the best predicted candidates in the second, nothing in the third."""
        taken = {trial.ranks for trial in history if trial.kind == "recovery"} | set(pending)
        phase = self.phase(space, history)
        if phase == "convergence":
            return ()
        if phase == "initialisation":
            first = [uniform(space), *_drawn(space, 4 * count, generator)]
            fresh = [ranks for ranks in dict.fromkeys(first) if ranks not in taken]
            return tuple(Proposal(ranks, "uniform" if ranks == uniform(space) else phase) for ranks in fresh[:count])
        drawn = [ranks for ranks in dict.fromkeys(_drawn(space, self.candidates, generator)) if ranks not in taken]
        gains = self.predict(space, history, drawn).gain_nats
        order = np.argsort(-gains, kind="stable").tolist()
        return tuple(Proposal(drawn[place], phase) for place in order[:count])

    def predict(self, space: RankSpace, history: Sequence[RankTrial], ranks: Sequence[Ranks]) -> Prediction:
        """Returns the network's predictions; the deviations are zero, because the network gives no uncertainty."""
        gains = paired_gains(space, history)
        nothing = np.zeros(len(ranks))
        if len(gains) < 2 or not ranks:
            return Prediction(nothing, nothing)
        targets = np.array(list(gains.values()))
        deviation = float(targets.std())
        if deviation == 0.0:
            return Prediction(nothing + targets[0], nothing)
        network = _trained(_normalised(space, list(gains)), torch.tensor((targets - targets.mean()) / deviation))
        predicted = targets.mean() + deviation * _forward(network, _normalised(space, ranks)).detach().numpy()
        return Prediction(predicted.astype(np.float64), nothing)

    def assess(self, space: RankSpace, history: Sequence[RankTrial]) -> CrossValidation | None:
        """Returns the cross-validated error of the network, on rank vectors that it was not trained on."""

        def predict(seen: Sequence[RankTrial], unseen: Sequence[RankTrial]) -> NDArray[np.float64]:
            return -self.predict(space, seen, [trial.ranks for trial in unseen]).gain_nats

        return cross_validate(space, history, predict)


def _drawn(space: RankSpace, count: int, generator: np.random.Generator) -> list[Ranks]:
    """Returns random vectors; slots that were not pruned keep the uniform rank."""
    allowed = choice_allowed(space)
    kept = plain(space, SHARE_PRUNED) == 0 if has_plain(space, SHARE_PRUNED) else np.zeros(len(space.slots), dtype=np.bool_)
    free = np.array([rank == space.uniform for rank in space.choices])[None, :] | ~kept[:, None]
    # Other ranks of fixed slots get a very low gain but remain possible, so that the budget can always be met.
    return [fill(space, np.where(free & allowed, generator.standard_normal(allowed.shape), -1e6)) for _ in range(count)]


def _normalised(space: RankSpace, ranks: Sequence[Ranks]) -> Tensor:
    """Returns the ranks as shares of the largest choice, (N, L) float64."""
    return torch.tensor(ranks, dtype=torch.float64) / space.choices[-1]


def _trained(inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Returns the weights and biases of a network trained on (N, L) inputs and (N,) targets."""
    generator = torch.Generator().manual_seed(_NETWORK_SEED)
    sizes = (inputs.shape[1], *_HIDDEN, 1)
    parameters: list[Tensor] = []
    for fan_in, fan_out in pairwise(sizes):
        bound = fan_in**-0.5  # the initialisation of torch.nn.Linear, but from our generator
        for shape in ((fan_out, fan_in), (fan_out,)):
            start = torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
            parameters.append(start.requires_grad_())
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(_forward(parameters, inputs), targets)
        loss.backward()
        optimizer.step()
    return parameters


def _forward(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Returns the outputs of the network, (N,)."""
    hidden = inputs
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        hidden = torch.relu(torch.nn.functional.linear(hidden, weight, bias))
    return torch.nn.functional.linear(hidden, parameters[-2], parameters[-1])[:, 0]


ALLOCATORS.include(PaperRankAdaptor())
