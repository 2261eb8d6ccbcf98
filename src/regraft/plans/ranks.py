"""Values of a rank search: the space of rank vectors, their measurements, and the rank plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from regraft.in_short import in_short

ALPHA_PER_RANK = 2.0
"""LoRA's alpha over the rank, where nothing else is asked for."""
RANK_CHOICES = (2, 4, 6, 8, 10, 12)
"""The ranks that a search chooses from, where nothing else is asked for."""


@dataclass(frozen=True, repr=False)
class RankPlan:
    """A LoRA rank for every adapted module.

    Attributes:
        fingerprint: Fingerprint of the model that the plan is for.
        method: Method that found the ranks.
        ranks: Module name to rank; other modules get no adapter.
        alpha_per_rank: LoRA's alpha is this times the rank.
        trainable_parameters: Number of trainable parameters of the adapters.
    """

    fingerprint: str
    method: str
    ranks: dict[str, int]
    alpha_per_rank: float = ALPHA_PER_RANK
    trainable_parameters: int = 0

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)


@dataclass(frozen=True)
class RankSlot:
    """The modules that share one rank in a search: those of a decoder layer, or a single module.

    Attributes:
        name: Unique name: ``layers.3``, or the module's full name.
        modules: Full names of the adapted modules that share the rank.
        layer: Index of the modules' decoder layer.
        parameters_per_rank: Trainable parameters that one more rank costs: the sum of ``in + out`` of the (pruned) modules.
        limit: Largest rank that every module can hold.
        features: Properties of the slot that are known before any recovery, by name: the pruned share, the removed importance, gradient
            energy and others. Every slot of a space has the same names.
    """

    name: str
    modules: tuple[str, ...]
    layer: int
    parameters_per_rank: int
    limit: int
    features: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class RankSpace:
    """The set of rank vectors from which an allocator chooses.

    Attributes:
        fingerprint: Fingerprint of the model.
        granularity: Kind of a slot: a layer or a module.
        slots: The slots, in the order of the model; a rank vector has one entry for each.
        choices: The allowed ranks, ascending, such as ``(2, 4, 6, 8, 10, 12)``.
        budget: Largest number of trainable parameters, a hard limit.
        uniform: The uniform rank that the budget was derived from, or the largest that fits a budget given in parameters.
    """

    fingerprint: str
    granularity: Literal["layer", "module"]
    slots: tuple[RankSlot, ...]
    choices: tuple[int, ...]
    budget: int
    uniform: int

    @property
    def uniform_ranks(self) -> tuple[int, ...]:
        """The rank vector with the uniform rank in every slot."""
        return (self.uniform,) * len(self.slots)

    def cost(self, ranks: Sequence[int]) -> int:
        """Returns the number of trainable parameters of a rank vector."""
        return sum(slot.parameters_per_rank * rank for slot, rank in zip(self.slots, ranks, strict=True))

    def holds(self, ranks: Sequence[int]) -> bool:
        """Returns whether a rank vector belongs to this space: all ranks allowed and within the limits and the budget."""
        allowed = all(rank in self.choices and rank <= slot.limit for slot, rank in zip(self.slots, ranks, strict=True))
        return allowed and self.cost(ranks) <= self.budget


@dataclass(frozen=True)
class RankTrial:
    """One measurement of one rank vector.

    Attributes:
        ranks: One rank for each slot.
        loss_nats: Held-out loss after recovery, lower is better; None when the recovery failed.
        fidelity: Number of trained steps as a share of a full recovery's, in (0, 1].
        cost: Cost of the measurement, in units of one full recovery.
        kind: Kind of the measurement: a real recovery, or a forward pass of the elastic adapter.
        seed: Seed of batches and initial values; trials with the same seed are paired.
        note: Reason of a failure, or empty.
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
    """A finished search, stored for meta-learning.

    Attributes:
        space: Space of the search, with the features of the slots.
        trials: All measurements, in order.
        model: Name of the model before pruning.
        parameters: Number of parameters of the pruned model.
        ratio: Share of the parameters that pruning removed.
        settings: Other settings that distinguish the search: data, steps, learning rate.
    """

    space: RankSpace
    trials: tuple[RankTrial, ...]
    model: str
    parameters: int
    ratio: float
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class CrossValidation:
    """Cross-validated error of a performance model on trials that it was not fitted to.

    Losses are centred within each level (kind, fidelity and seed) first, because only differences between rank vectors matter.

    Attributes:
        r2: One minus the squared error over the variance; 0 or less means no better than the mean.
        rmse_nats: Root of the mean squared error.
        rank_correlation: Spearman's correlation of predicted and measured loss; 0 when either is constant.
        trials: Number of predicted trials.
        folds: Number of parts in which rank vectors were left out, each vector with all of its trials.
    """

    r2: float
    rmse_nats: float
    rank_correlation: float
    trials: int
    folds: int


@dataclass(frozen=True)
class Finalist:
    """Gain of a rank vector over the uniform one, measured in pairs on fresh seeds.

    Attributes:
        ranks: The rank vector.
        gains_nats: Loss of the uniform vector minus loss of this one, for each seed.
        mean_nats: Mean of the gains.
        low_nats: Lower end of the confidence interval of the mean.
        high_nats: Upper end of the confidence interval of the mean.
    """

    ranks: tuple[int, ...]
    gains_nats: tuple[float, ...]
    mean_nats: float
    low_nats: float
    high_nats: float


@dataclass(frozen=True)
class Confirmation:
    """Result of comparing a search's finalists with the uniform rank vector.

    Attributes:
        finalists: The finalists, largest mean gain first.
        kept: The vector to use: the first finalist if its interval lies above zero, else the uniform vector.
        confidence: Confidence that all intervals hold jointly, such as 0.95.
        verdict: The result in words.
    """

    finalists: tuple[Finalist, ...]
    kept: tuple[int, ...]
    confidence: float
    verdict: str


@dataclass(frozen=True)
class RankSearch:
    """Result of a rank search.

    Attributes:
        plan: The ranks to use.
        space: Space of the search, with the features of the slots.
        trials: The search's measurements, in order; empty for methods that decide from the features alone.
        origins: Origin of the vector of each trial.
        found: The vector that the search chose, before confirmation.
        confirming: The measurements for the confirmation.
        confirmation: Comparison of the found vector and the best closed form with the uniform one; None without confirmation.
        error: Cross-validated error of the performance model; None without such a model, or with too few trials.
        refits: Cross-validated error after every round of the search that had enough trials, in order.
        agreement: Spearman's correlation of the elastic adapter's scores with real recoveries of the same vectors; None when fewer than
            three vectors have both.
        verdict: The result in words.
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
        """Cost of the search's measurements, in full recoveries."""
        return sum(trial.cost for trial in self.trials)

    @property
    def confirming_cost(self) -> float:
        """Cost of the confirming measurements, in full recoveries."""
        return sum(trial.cost for trial in self.confirming)
