"""What an adapter is to the rest of the house.

There are two kinds, found by name in :data:`ADAPTERS`:

- a :class:`Method` is ours: it knows one linear map at a time and makes its change, a :class:`Delta`. Injection, freezing, merging,
  saving and loading of all methods exist once, in :mod:`regraft.surgery`.
- an :class:`Adapter` is a library's: it attaches itself to a whole model, merges and saves. PEFT's are
  (:mod:`regraft.adapters.peft_backed`), and :mod:`regraft.surgery.per_module` makes one of any method.

Which module gets which rank is decided here for both (:func:`make_request`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters.linear_like import shape_of
from regraft.adapters.seeding import derived_seed
from regraft.errors import InputError, PlanError, did_you_mean
from regraft.plans import RankPlan
from regraft.registry import Registry
from regraft.settings import RecoverSettings, Settings, checked, option_values

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Defaults:
    """What an adapter trains with where nothing is asked for.

    Attributes:
        lr: Peak learning rate.
        alpha_per_rank: LoRA's alpha is this times the rank; None for an adapter that has no such scale.
        dropout: Share of the adapter's inputs that is dropped while training.
        eps: What Adam adds to the root of the second moment; None for torch's own.
    """

    lr: float = 1e-3
    alpha_per_rank: float | None = 2.0
    dropout: float = 0.05
    eps: float | None = None


@dataclass(frozen=True)
class AdapterRequest:
    """What is asked of an adapter.

    Attributes:
        ranks: Rank of every adapted module by its full name, in the order of the model.
        alphas: LoRA's alpha of the same modules: the change is ``alpha / rank`` times the product of the factors.
        dropout: Share of the adapter's inputs that is dropped while training.
        seed: Of the adapter's initial values.
        options: The adapter's own section of settings.
        steps: Optimizer steps that will be trained; 0 where that is not known.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float
    seed: int
    options: Settings = field(default_factory=Settings)
    steps: int = 0


def output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss that a model of transformers computes from the labels of a batch."""
    return model(**batch).loss


@dataclass(frozen=True)
class Evidence:
    """What the first values of some adapters are computed from.

    Attributes:
        batches: Returns so many training batches on the model's device, always the same ones.
        loss: What is trained on.
    """

    batches: Callable[[int], Sequence[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor] = output_loss


@dataclass(frozen=True)
class LowRank:
    """A change of a weight as a plain LoRA without a scale: ``left @ right``.

    Attributes:
        left: ``(out, r)`` float32, LoRA's B.
        right: ``(r, in)`` float32, LoRA's A.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: They require gradients.
        lr: Peak learning rate; the schedule multiplies it.
        eps: Of Adam; None for PyTorch's 1e-8.
    """

    parameters: tuple[nn.Parameter, ...]
    lr: float
    eps: float | None = None


@dataclass(frozen=True)
class Spec:
    """One change of one linear map.

    Attributes:
        name: Of the module.
        rows: Output features of the map.
        columns: Input features.
        rank: As asked; what it means is the method's matter.
        alpha: LoRA's alpha.
        dropout: Share of the inputs that is dropped while training.
        seed: Of the first values, this module's own.
        options: The method's section of settings.
    """

    name: str
    rows: int
    columns: int
    rank: int
    alpha: float
    dropout: float
    seed: int
    options: Any

    @property
    def scale(self) -> float:
        """LoRA's scale, alpha over rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    def generator(self) -> torch.Generator:
        """Returns a new generator of this module's seed, on the CPU, so that first values are the same on every device."""
        return torch.Generator().manual_seed(self.seed)


class Delta(nn.Module, ABC):
    """A trainable change of one linear map W ``(out, in)``. Parameters are float32, whatever W is.

    Args:
        spec: What it is of.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """Returns the change of the output, ``(..., out)``, for inputs ``(..., in)``."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the change for one-hot inputs: ``(..., out)`` for the places of the ones, int64 ``(...)``."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Returns the change of the weight, ``(out, in)`` float32."""

    @abstractmethod
    def low_rank(self) -> LowRank:
        """Returns the change as two factors, exactly.

        Raises:
            InputError: It has no small rank; the message says what to do instead.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Returns :meth:`delta`."""
        return self.delta(x)

    def stored(self) -> dict[str, Tensor]:
        """Returns what a file must hold to make this change again, by name: all parameters, unless a method needs less or more."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def rates(self, lr: float | None, default: float) -> dict[str, float]:
        """Returns the peak learning rate of every parameter by name.

        Args:
            lr: What the user asked for, or None.
            default: The method's, for None.
        """
        rate = lr if lr is not None else default
        return {name: rate for name, _ in self.named_parameters()}

    def factored(self) -> LowRank:
        """Returns the change as two factors of any rank, to look at its spectrum."""
        return self.low_rank()

    def finished(self) -> Delta:
        """Returns the change as it is kept after training: itself, unless a method makes it smaller."""
        return self

    def truncated(self, threshold: float) -> Delta | None:
        """Returns the change without its singular values up to ``threshold``, or None where nothing is left.

        Raises:
            InputError: The method's changes cannot be cut.
        """
        raise InputError(f"the change of '{self.spec.name}' cannot be trimmed; only deep_lora's can")


class Method(ABC):
    """A kind of change, made for one linear map at a time.

    Attributes:
        name: In the registry and in saved files.
        options: The class of its settings.
        defaults: What it trains with.
    """

    name: ClassVar[str]
    options: ClassVar[type[Settings]]
    defaults: ClassVar[Defaults]

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Refuses what does not fit the map.

        Raises:
            InputError: The message gives the value, the limit and the remedy.
        """

    @abstractmethod
    def count(self, spec: Spec) -> int:
        """Returns how many numbers will be trained."""

    @abstractmethod
    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change with its first values, on the CPU or on ``given``'s device.

        Args:
            spec: Checked.
            given: The weight ``(out, in)``, or the mean first gradient with respect to it where batches were asked for.
        """

    @abstractmethod
    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from what :meth:`Delta.stored` gave.

        Args:
            spec: As it was saved.
            tensors: By name.
            weight: W, ``(out, in)``.

        Raises:
            InputError: They do not fit.
        """

    def gradient_batches(self, options: Settings) -> int:
        """Returns how many training batches the first gradient is the mean of; 0 where :meth:`make` is given the weight."""
        return 0

    def trim_tolerance(self, options: Settings) -> float:
        """Returns the share of the largest singular value of all changes below which they are cut after training; 0: nowhere."""
        return 0.0


class Adapter(Protocol):
    """One kind of adapter on a whole model. What ``attach`` returns is what the others are given back."""

    @property
    def options(self) -> type[Settings]:
        """The class of its settings."""
        ...

    @property
    def defaults(self) -> Defaults:
        """What it trains with."""
        ...

    def attach(self, model: PreTrainedModel, request: AdapterRequest, evidence: Evidence | None) -> nn.Module:
        """Puts the adapter on a model, in place, with only its own parameters trainable.

        The output is unchanged at first, or all but. Must not touch the global random generators: initial values follow from
        ``request.seed``.

        Raises:
            InputError: It does not fit, or evidence is needed and there is none. The model is unchanged then.
        """
        ...

    def after_step(self, adapted: nn.Module, step: int) -> None:
        """Is called after optimizer step ``step`` (from 1), before the gradients are cleared."""
        ...

    def penalty(self, adapted: nn.Module) -> Tensor | None:
        """Returns what is added to the mean loss of every step, a scalar with gradients, or None for nothing."""
        ...

    def state(self, adapted: nn.Module) -> dict[str, Tensor]:
        """Returns what :meth:`after_step` keeps beside the parameters, by name, so that a run that was stopped goes on with it."""
        ...

    def put_state(self, adapted: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Puts back what :meth:`state` returned."""
        ...

    def finish(self, adapted: nn.Module) -> None:
        """Is called once after training: makes the adapter what is kept."""
        ...

    def factors(self, adapted: nn.Module) -> dict[str, LowRank]:
        """Returns the change of every module with respect to the original weights as two factors, by full name.

        Raises:
            InputError: The adapter has no such form; the message offers the merge.
        """
        ...

    def merge(self, adapted: nn.Module) -> PreTrainedModel:
        """Folds the adapter into the weights, computed in float32 or better, and returns the model without it."""
        ...

    def save(self, adapted: nn.Module, folder: Path, base: str) -> None:
        """Writes the adapter alone, as safetensors and JSON, the same bytes for the same values.

        Args:
            adapted: What ``attach`` returned.
            folder: An empty folder.
            base: The model that the adapter belongs to, as its users name it.
        """
        ...


@runtime_checkable
class Grouped(Protocol):
    """An adapter whose parameters do not all train at the same learning rate."""

    def parameter_groups(self, adapted: nn.Module, lr: float | None) -> Sequence[ParameterGroup]:
        """Returns all trained parameters, each in one group.

        Args:
            adapted: What ``attach`` returned.
            lr: The learning rate that was asked for; None for the adapter's own.
        """
        ...


ADAPTERS: Registry[Adapter | Method] = Registry("adapter", group="regraft.adapters")


def adapter_options(settings: RecoverSettings) -> Settings:
    """Returns the checked options of the adapter that the settings name.

    Raises:
        InputError: The adapter is not known.
        ConfigError: An option is not known or out of range; all problems are listed.
    """
    source = f"options of adapter '{settings.adapter}'"
    return checked(ADAPTERS.get(settings.adapter).options, option_values(settings.adapter_options), source)


def make_request(modules: Mapping[str, nn.Module], settings: RecoverSettings, ranks: RankPlan | None, seed: int) -> AdapterRequest:
    """Decides rank and alpha of every module: the plan's where there is one, else the same rank everywhere.

    Args:
        modules: The modules that can be adapted, by full name.
        settings: Adapter, rank, alpha and dropout.
        ranks: A rank for each module; modules it does not name, or names with rank 0, get no adapter.
        seed: Of the initial values.

    Raises:
        InputError: A rank exceeds what its module can hold, or the adapter has no alpha and one was given.
        ConfigError: An option of the adapter is wrong.
        PlanError: The plan names a module that the model does not have, a negative rank, or no module at all.
    """
    defaults, options = ADAPTERS.get(settings.adapter).defaults, adapter_options(settings)
    if settings.alpha is not None and defaults.alpha_per_rank is None:
        raise InputError(f"--alpha {settings.alpha:g} means nothing to adapter '{settings.adapter}', which has no scale; leave it out")
    if ranks is None:
        chosen = dict.fromkeys(modules, settings.rank)
        alpha = settings.alpha if settings.alpha is not None else (defaults.alpha_per_rank or 1.0) * settings.rank
        alphas = dict.fromkeys(modules, alpha)
    else:
        _check_names(modules, ranks)
        chosen = {name: ranks.ranks[name] for name in modules if ranks.ranks.get(name, 0) > 0}
        alphas = {name: ranks.alpha_per_rank * rank for name, rank in chosen.items()}
        if not chosen:
            raise PlanError("the rank plan gives no module a rank; give at least one module a rank of 1 or more")
    _check_limits(modules, chosen, from_plan=ranks is not None)
    dropout = settings.dropout if settings.dropout is not None else defaults.dropout
    return AdapterRequest(chosen, alphas, dropout, seed, options, settings.steps)


def make_specs(modules: Mapping[str, nn.Module], request: AdapterRequest) -> dict[str, Spec]:
    """Returns what is asked of every module, each with a seed of its own."""
    specs: dict[str, Spec] = {}
    for name, rank in request.ranks.items():
        rows, columns = shape_of(modules[name])
        seed = derived_seed(request.seed, "adapter", name)
        specs[name] = Spec(name, rows, columns, rank, request.alphas[name], request.dropout, seed, request.options)
    return specs


def groups_by_rate(rates: Iterable[tuple[nn.Parameter, float]], eps: float | None) -> tuple[ParameterGroup, ...]:
    """Gathers parameters of equal rate, groups in the order in which their rates first come."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in rates:
        found.setdefault(rate, []).append(parameter)
    return tuple(ParameterGroup(tuple(parameters), rate, eps) for rate, parameters in found.items())


def _check_names(modules: Mapping[str, nn.Module], plan: RankPlan) -> None:
    for name, rank in plan.ranks.items():
        if name not in modules:
            raise PlanError(
                f"the rank plan names '{name}', which this model does not have{did_you_mean(name, modules)}; "
                "make the plan for the model that is trained"
            )
        if rank < 0:
            raise PlanError(f"the rank plan gives '{name}' rank {rank}; ranks are 0 (no adapter) or more")


def _check_limits(modules: Mapping[str, nn.Module], ranks: Mapping[str, int], *, from_plan: bool) -> None:
    limits = {name: min(shape_of(modules[name])) for name in ranks}
    for name, rank in ranks.items():
        if rank > limits[name]:
            rows, columns = shape_of(modules[name])
            remedy = "lower it in the plan" if from_plan else f"use --rank {min(limits.values())} or less"
            raise InputError(f"rank {rank} exceeds the limit {limits[name]} of '{name}' ({rows} x {columns}); {remedy}")
