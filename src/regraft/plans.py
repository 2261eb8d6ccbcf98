"""The values that pass between stages: frozen, compared by value, and the same after a round trip through JSON.

A stage is a verb; what it decides is one of these. They are printed by ``--dry-run``, stored in the run folder and in the
saved model, and can be replayed. Nothing here knows a model, a tensor or a file system.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from regraft.errors import PlanError

Side = Literal["out", "in"]
GroupKind = Literal["ffn", "heads", "query_heads", "residual", "attention", "mlp", "layer"]
Shape = Literal["uniform", "per-layer"]
WHOLE: tuple[GroupKind, ...] = ("layer", "attention", "mlp")  # kinds of groups of one unit, which stays or goes

T = TypeVar("T")


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(value: Any, indent: int | None = 2) -> str:
    """Returns the JSON text of a plan; :func:`from_json` reads it back to an equal value."""
    return _adapter(cast("type[Any]", type(value))).dump_json(value, indent=indent).decode()


def to_dict(value: Any) -> dict[str, Any]:
    """Returns a plan as plain JSON types."""
    return json.loads(to_json(value, indent=None))


def from_json(kind: type[T], text: str | bytes) -> T:
    """Reads a plan of type ``kind``.

    Raises:
        PlanError: The text is not JSON or does not describe such a plan; the message names the first field at fault.
    """
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole text"
        raise PlanError(f"not a {kind.__name__}: {where}: {first['msg']}; write it again with regraft") from None


@dataclass(frozen=True)
class Member:
    """One axis of one parameter, cut into the units of a group.

    Unit ``u`` owns the indices ``offset + k*stride + u*size + [0, size)`` for ``k`` in ``range(repeats)``. A plain projection
    has ``repeats = 1``; a fused one (gate and up in one matrix) appears as several members with different offsets; query heads
    that are removed evenly from every key-value group use ``repeats`` and ``stride``.

    Attributes:
        parameter: Full name of the parameter, such as ``model.layers.0.mlp.up_proj.weight``.
        axis: Axis of the parameter's tensor along which units lie.
        side: ``"out"`` when the axis produces the unit's channels, ``"in"`` when it reads them.
        offset: First index of unit 0.
        size: Consecutive indices of one unit.
        repeats: How many such blocks one unit owns.
        stride: Distance between the blocks of one unit.
    """

    parameter: str
    axis: int
    side: Side
    offset: int = 0
    size: int = 1
    repeats: int = 1
    stride: int = 0

    def indices(self, unit: int) -> Iterator[int]:
        """Yields the indices along ``axis`` that unit ``unit`` owns."""
        for block in range(self.repeats):
            start = self.offset + block * self.stride + unit * self.size
            yield from range(start, start + self.size)

    @property
    def width(self) -> int:
        """How many indices one unit owns."""
        return self.size * self.repeats


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each with everything that must go with it.

    Attributes:
        name: Unique, stable: ``layers.3.ffn``.
        kind: What a unit is.
        layer: Index of the decoder layer, or None for the residual width.
        units: How many units there are.
        members: The coupled axes.
        unit_parameters: How many parameters go with one unit.
    """

    name: str
    kind: GroupKind
    layer: int | None
    units: int
    members: tuple[Member, ...]
    unit_parameters: int


@dataclass(frozen=True)
class Groups:
    """Everything in one model that can be pruned.

    Attributes:
        fingerprint: Of the model the groups were found in.
        family: ``model_type`` of its config.
        layers: How many decoder layers it has.
        parameters: How many parameters it has, tied ones counted once.
        groups: In the order of the layers.
        shapes: Of every parameter, by name; what overlapping cuts leave is counted from them.
    """

    fingerprint: str
    family: str
    layers: int
    parameters: int
    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def named(self) -> dict[str, Group]:
        """Returns the groups by name."""
        return {group.name: group for group in self.groups}

    def of(self, kind: GroupKind) -> tuple[Group, ...]:
        """Returns the groups of one kind, in the order of the layers."""
        return tuple(group for group in self.groups if group.kind == kind)


@dataclass(frozen=True)
class Scores:
    """How much each unit matters: higher is kept.

    Attributes:
        fingerprint: Of the model that was scored.
        criterion: Name and settings, such as ``taylor(order=first, reduce=sum)``.
        values: One number per unit for every group name.
    """

    fingerprint: str
    criterion: str
    values: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            if not all(math.isfinite(value) for value in values):
                raise PlanError(
                    f"scores of {name} are not finite; the model or its gradients hold NaN or infinity: "
                    "use --dtype float32, or another criterion"
                )


@dataclass(frozen=True)
class Curve:
    """What it does to the model to keep only so many units of one group, everything else whole.

    Attributes:
        kept: Numbers of units, ascending; the last is the whole group.
        damage_nats: Kullback-Leibler divergence to the dense model per token at each; the last is zero.
        cost: What the group costs at each: parameters, bytes or milliseconds.
    """

    kept: tuple[int, ...]
    damage_nats: tuple[float, ...]
    cost: tuple[float, ...]


@dataclass(frozen=True)
class Curves:
    """Measured damage against size for every group that may be cut.

    Attributes:
        fingerprint: Of the model.
        unit: Of the costs.
        fixed_cost: Of everything that is not in a curve.
        values: Group name to curve.
    """

    fingerprint: str
    unit: Literal["parameters", "bytes", "milliseconds"]
    fixed_cost: float
    values: dict[str, Curve]


@dataclass(frozen=True)
class Cut:
    """What stays of one group: the kept units, ascending."""

    group: str
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Removed:
    """What a plan takes from one group, for those who have only the pruned model.

    Attributes:
        units: How many there were.
        importance: Sum of the scores of those that went, in the criterion's unit.
    """

    units: int
    importance: float


@dataclass(frozen=True)
class PrunePlan:
    """Which units of which groups stay; everything not named stays whole.

    Attributes:
        fingerprint: Of the model the plan is for.
        criterion: How units were scored.
        selection: How widths were chosen.
        shape: Whether every layer must end with the same widths.
        ratio: Share of all parameters that was asked for.
        align: Widths are multiples of this.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        cuts: One for each group that loses units.
        made_with: What it takes to go from the plan to the same bytes again: the prune settings, the seed, and the SHA-256 of the
            calibration windows (None without text). Empty where that is not known.
        removed: What goes of every group, by name; groups that stay whole too. Empty in plans from before it was recorded.
    """

    fingerprint: str
    criterion: str
    selection: str
    shape: Shape
    ratio: float
    align: int
    parameters_before: int
    parameters_after: int
    cuts: tuple[Cut, ...]
    made_with: Mapping[str, Any] = field(default_factory=dict[str, Any])
    removed: Mapping[str, Removed] = field(default_factory=dict[str, Removed])

    @property
    def achieved(self) -> float:
        """Share of all parameters that the plan removes."""
        return 1.0 - self.parameters_after / self.parameters_before


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


@dataclass(frozen=True)
class LossReport:
    """Loss of a causal language model on one text, and everything needed to measure it again.

    Attributes:
        loss_nats: Mean negative log-likelihood of a predicted token.
        perplexity: ``exp(loss_nats)``.
        bits_per_byte: Total negative log-likelihood in bits over the bytes of the text that was predicted.
        window_tokens: Longest context.
        stride_tokens: Distance between the starts of two windows; tokens in the overlap are context only.
        tokens: How many tokens were predicted.
        bytes: How many bytes of text those tokens are.
        documents: How many documents were read.
        bos: Whether every document starts with the beginning-of-sequence token.
        text: What was read: a file name or the name of a built-in text.
        split: Which part of it, such as ``test``.
    """

    loss_nats: float
    perplexity: float
    bits_per_byte: float
    window_tokens: int
    stride_tokens: int
    tokens: int
    bytes: int
    documents: int
    bos: bool
    text: str
    split: str


@dataclass(frozen=True)
class SizeReport:
    """How large a model is.

    Attributes:
        parameters: Tied ones counted once.
        bytes_on_disk: Of its safetensors files; 0 when it was never saved.
        bytes_in_memory: Of its parameters and buffers.
        macs_per_token: Multiply-accumulates of one token's forward pass, head included, attention over ``context_tokens``.
        context_tokens: Context that ``macs_per_token`` assumes.
    """

    parameters: int
    bytes_on_disk: int
    bytes_in_memory: int
    macs_per_token: int
    context_tokens: int


@dataclass(frozen=True)
class SpeedReport:
    """How fast a model runs, as medians of repeated measurements on one machine.

    Attributes:
        prefill_seconds: One forward pass over ``prompt_tokens``.
        decode_seconds_per_token: One step of generation with a KV cache after that prompt.
        peak_memory_bytes: Largest resident memory while measuring (device memory on a GPU).
        prompt_tokens: Length of the prompt.
        decoded_tokens: How many tokens were generated.
        repeats: How many measurements the medians are of.
        threads: CPU threads in use.
        device: Where it ran.
    """

    prefill_seconds: float
    decode_seconds_per_token: float
    peak_memory_bytes: int
    prompt_tokens: int
    decoded_tokens: int
    repeats: int
    threads: int
    device: str


@dataclass(frozen=True)
class Measurement:
    """Everything that one harness measured of one model.

    Attributes:
        label: Which model: ``dense``, ``pruned``, ``recovered`` or a path.
        loss: On the held-out text.
        size: Parameters, bytes and MACs.
        speed: Prefill and decode; None when it was not asked for.
    """

    label: str
    loss: LossReport
    size: SizeReport
    speed: SpeedReport | None = None


@dataclass(frozen=True)
class Provenance:
    """How a folder came to be; written as ``regraft.json``.

    Attributes:
        command: The command or call that made it.
        source: The model it was made from.
        source_fingerprint: Of that model.
        seed: Of everything random.
        versions: Library name to version.
        plan: The prune plan, when units were cut.
        ranks: The rank plan, when adapters were trained.
        settings: Whatever else the stage was told.
        files: SHA-256 of every weight file, by name; checked when the folder is loaded.
        parents: The provenance of the folders before, oldest first.
    """

    command: str
    source: str
    source_fingerprint: str
    seed: int
    versions: Mapping[str, str]
    plan: PrunePlan | None = None
    ranks: RankPlan | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    parents: tuple[dict[str, Any], ...] = ()
