"""LoRA ranks: the space of rank vectors, measurements of them, and the plan that a search ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RankPlan:
    """A LoRA rank for every adapted module.

    Attributes:
        fingerprint: Of the model the plan is for.
        method: How the ranks were found.
        ranks: Module name to rank; modules not named get no adapter.
        alpha_per_rank: LoRA's alpha is this times the rank.
        trainable_parameters: What the adapters cost.
    """

    fingerprint: str
    method: str
    ranks: dict[str, int]
    alpha_per_rank: float = 2.0
    trainable_parameters: int = 0


@dataclass(frozen=True)
class RankSlot:
    """What gets one rank in a search: a decoder layer, or one module.

    Attributes:
        name: Unique: ``layers.3``, or the module's full name.
        modules: The adapted modules that share the rank, by full name.
        layer: Index of their decoder layer.
        parameters_per_rank: Trainable parameters that one more rank costs: the sum of ``in + out`` of the modules, as they are now.
        limit: Largest rank that every module can hold.
        features: What is known of the slot before any recovery, by name: the share that was pruned, the importance that was removed,
            gradient energy and the like. Every slot of a space has the same names.
    """

    name: str
    modules: tuple[str, ...]
    layer: int
    parameters_per_rank: int
    limit: int
    features: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class RankSpace:
    """The rank vectors among which an allocator chooses.

    Attributes:
        fingerprint: Of the model.
        granularity: What a slot is.
        slots: In the order of the model; a rank vector has one entry for each.
        choices: The ranks, ascending, such as ``(2, 4, 6, 8, 10, 12)``.
        budget: Most trainable parameters, a hard limit.
        uniform: The uniform rank whose cost the budget is, or the largest that fits where the budget was given as a number.
    """

    fingerprint: str
    granularity: Literal["layer", "module"]
    slots: tuple[RankSlot, ...]
    choices: tuple[int, ...]
    budget: int
    uniform: int

    @property
    def uniform_ranks(self) -> tuple[int, ...]:
        """The uniform rank for every slot."""
        return (self.uniform,) * len(self.slots)

    def cost(self, ranks: Sequence[int]) -> int:
        """Returns the trainable parameters of a rank vector."""
        return sum(slot.parameters_per_rank * rank for slot, rank in zip(self.slots, ranks, strict=True))

    def holds(self, ranks: Sequence[int]) -> bool:
        """Returns whether a rank vector is of this space: from the choices, within every limit and within the budget."""
        allowed = all(rank in self.choices and rank <= slot.limit for slot, rank in zip(self.slots, ranks, strict=True))
        return allowed and self.cost(ranks) <= self.budget


@dataclass(frozen=True)
class RankTrial:
    """One measurement of one rank vector.

    Attributes:
        ranks: One for each slot.
        loss_nats: Held-out loss after recovery, lower is better; None when the recovery failed.
        fidelity: Share of a full recovery's steps that were trained, in (0, 1].
        cost: What the measurement took, in units of one full recovery.
        kind: A real recovery, or a forward pass of the elastic adapter.
        seed: Of batches and initial values; trials of one seed are paired.
        note: Why it failed, or empty.
    """

    ranks: tuple[int, ...]
    loss_nats: float | None
    fidelity: float
    cost: float
    kind: Literal["recovery", "elastic"] = "recovery"
    seed: int = 0
    note: str = ""


@dataclass(frozen=True)
class PastSearch:
    """A search that is over, kept for meta-learning.

    Attributes:
        space: Where it searched, with the features of the slots.
        trials: Everything that was measured, in the order of measuring.
        model: Name of the model before pruning.
        parameters: Of the pruned model.
        ratio: Share of the parameters that pruning removed.
        settings: Whatever else tells it from others: data, steps, learning rate.
    """

    space: RankSpace
    trials: tuple[RankTrial, ...]
    model: str
    parameters: int
    ratio: float
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class CrossValidation:
    """How well a performance model predicts trials that it has not seen.

    Levels (kind, fidelity and seed of a trial) are centred first: what counts is the difference between rank vectors.

    Attributes:
        r2: One minus the squared error over the variance; 0 or less: no better than the mean.
        rmse_nats: Root of the mean squared error.
        rank_correlation: Spearman's, of predicted and measured loss; 0 where either is constant.
        trials: How many were predicted.
        folds: In how many parts they were left out; whole rank vectors at a time.
    """

    r2: float
    rmse_nats: float
    rank_correlation: float
    trials: int
    folds: int


@dataclass(frozen=True)
class Finalist:
    """What a rank vector gains over the uniform one, measured on fresh seeds side by side.

    Attributes:
        ranks: The vector.
        gains_nats: Loss of uniform minus loss of the vector, one for each seed.
        mean_nats: Of the gains.
        low_nats: Lower end of the interval.
        high_nats: Upper end.
    """

    ranks: tuple[int, ...]
    gains_nats: tuple[float, ...]
    mean_nats: float
    low_nats: float
    high_nats: float


@dataclass(frozen=True)
class Confirmation:
    """Whether any of a search's finalists beats the uniform rank vector.

    Attributes:
        finalists: With the largest mean gain first.
        kept: The vector to use: the first finalist where its interval excludes no gain, else uniform.
        confidence: That all intervals hold together, such as 0.95.
        verdict: What happened, in plain words.
    """

    finalists: tuple[Finalist, ...]
    kept: tuple[int, ...]
    confidence: float
    verdict: str


@dataclass(frozen=True)
class RankSearch:
    """Everything that came of allocating ranks.

    Attributes:
        plan: The ranks to use.
        space: Among which they were chosen, with the features of the slots.
        trials: What was measured to choose, in order; empty for methods that decide from the features alone.
        origins: Where the vector of each trial comes from.
        found: The vector that was chosen before it was confirmed.
        confirming: What was measured to confirm it.
        confirmation: Of that vector and the best closed form against uniform; None where nothing was to be confirmed.
        error: Cross-validated error of the performance model; None without one, or with too few trials.
        refits: The same after every round of the search that had enough trials, in order.
        agreement: Spearman's correlation of the elastic adapter's scores with real recoveries of the same vectors; None where fewer than
            three vectors have both.
        verdict: What happened, in plain words.
    """

    plan: RankPlan
    space: RankSpace
    trials: tuple[RankTrial, ...]
    origins: tuple[str, ...]
    found: tuple[int, ...]
    confirming: tuple[RankTrial, ...]
    confirmation: Confirmation | None
    error: CrossValidation | None
    refits: tuple[CrossValidation, ...]
    agreement: float | None
    verdict: str

    @property
    def search_cost(self) -> float:
        """What choosing took, in full recoveries."""
        return sum(trial.cost for trial in self.trials)

    @property
    def confirming_cost(self) -> float:
        """What confirming took, in full recoveries."""
        return sum(trial.cost for trial in self.confirming)
