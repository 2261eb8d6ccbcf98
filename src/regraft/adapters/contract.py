"""The contract of an adapter.

There are two kinds, found by name in :data:`ADAPTERS`:

- a :class:`Method` works on one linear map at a time and makes a :class:`Delta`, a trainable change of its weight. Injection, freezing,
  merging, saving and loading are written once for all methods, in :mod:`regraft.surgery`.
- an :class:`Adapter` works on a whole model: it attaches itself, merges and saves. PEFT's adapters are of this kind
  (:mod:`regraft.adapters.peft_backed`), and :mod:`regraft.surgery.per_module` makes an adapter from any method.

For both kinds, :func:`make_request` decides the rank of each module.
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
from regraft.plans import ALPHA_PER_RANK, RankPlan
from regraft.registry import Registry
from regraft.settings import RecoverSettings, Settings, checked, option_values

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Defaults:
    """Default training settings of an adapter.

    Attributes:
        lr: Peak learning rate.
        alpha_per_rank: LoRA's alpha is this times the rank; None for an adapter without such a scale.
        dropout: Dropout rate of the adapter's inputs in training.
        eps: Number that Adam adds to the root of the second moment; None for torch's default.
    """

    lr: float = 1e-3
    alpha_per_rank: float | None = ALPHA_PER_RANK
    dropout: float = 0.05
    eps: float | None = None


@dataclass(frozen=True)
class AdapterRequest:
    """The rank, alpha and other settings with which an adapter is made.

    Attributes:
        ranks: Full name of every adapted module to its rank, in the order of the model.
        alphas: LoRA's alpha of the same modules: the weight change is ``alpha / rank`` times the product of the factors.
        dropout: Dropout rate of the adapter's inputs in training.
        seed: Seed of the adapter's initial values.
        options: Options of this kind of adapter.
        steps: Number of optimizer steps of the training; 0 if it is not known.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float
    seed: int
    options: Settings = field(default_factory=Settings)
    steps: int = 0


def output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss that a transformers model computes from the labels of a batch."""
    return model(**batch).loss


@dataclass(frozen=True)
class Evidence:
    """Training batches from which some adapters compute their initial values.

    Attributes:
        batches: Function from a number of batches to that many training batches on the model's device, always the same ones.
        loss: The training loss of a batch.
    """

    batches: Callable[[int], Sequence[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor] = output_loss


@dataclass(frozen=True)
class LowRank:
    """A weight change as two factors, a plain LoRA without a scale: ``left @ right``.

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
        parameters: The parameters, which require gradients.
        lr: Peak learning rate, which the schedule multiplies.
        eps: Epsilon of Adam; None for PyTorch's 1e-8.
    """

    parameters: tuple[nn.Parameter, ...]
    lr: float
    eps: float | None = None


@dataclass(frozen=True)
class Spec:
    """Specification of the adapter of one linear map.

    Attributes:
        name: Name of the module.
        rows: Number of output features of the map.
        columns: Number of input features of the map.
        rank: The requested rank; its meaning depends on the method.
        alpha: LoRA's alpha.
        dropout: Dropout rate of the inputs in training.
        seed: Seed of the initial values, different for each module.
        options: Options of the method.
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
        """Scale of LoRA, alpha divided by the rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (rows, columns)."""
        return self.rows, self.columns

    def generator(self) -> torch.Generator:
        """Returns a new CPU generator with this module's seed, so that initial values are the same on every device."""
        return torch.Generator().manual_seed(self.seed)


class Delta(nn.Module, ABC):
    """A trainable change of one linear map W ``(out, in)``. Its parameters are float32 for every dtype of W.

    Args:
        spec: Specification of the map and the adapter.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """Returns the change of the output, ``(..., out)``, for inputs ``(..., in)``."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Returns the change of the output, ``(..., out)``, for one-hot inputs given by the indices of the ones, int64 ``(...)``."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Returns the change of the weight, ``(out, in)`` float32."""

    @abstractmethod
    def low_rank(self) -> LowRank:
        """Returns the weight change as two exact factors.

        Raises:
            InputError: The change has no low rank; the message gives the alternative.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the change of the output; see :meth:`delta`."""
        return self.delta(x)

    def stored(self) -> dict[str, Tensor]:
        """Returns the tensors to store, by name: all parameters, unless the method needs fewer or more to restore the change."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def rates(self, lr: float | None, default: float) -> dict[str, float]:
        """Returns the peak learning rate of every parameter by name.

        Args:
            lr: The user's learning rate, or None.
            default: The method's learning rate, used if ``lr`` is None.
        """
        rate = lr if lr is not None else default
        return {name: rate for name, _ in self.named_parameters()}

    def factored(self) -> LowRank:
        """Returns the weight change as two factors of any rank, for computing its spectrum."""
        return self.low_rank()

    def finished(self) -> Delta:
        """Returns the final form of the change after training: itself, unless the method compresses it."""
        return self

    def truncated(self, threshold: float) -> Delta | None:
        """Returns the change without its singular values up to ``threshold``, or None if none is left.

        Raises:
            InputError: The method does not support this.
        """
        raise InputError(f"the change of '{self.spec.name}' cannot be trimmed; only deep_lora's can")


class Method(ABC):
    """A kind of adapter that is made for one linear map at a time.

    Attributes:
        name: Name in the registry and in saved files.
        options: Class of the method's options.
        defaults: Default training settings.
    """

    name: ClassVar[str]
    options: ClassVar[type[Settings]]
    defaults: ClassVar[Defaults]

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Refuses a specification that does not fit the map.

        Raises:
            InputError: A value is out of range; the message gives the value, the limit and the remedy.
        """

    @abstractmethod
    def count(self, spec: Spec) -> int:
        """Returns the number of trainable parameters."""

    @abstractmethod
    def make(self, spec: Spec, given: Tensor) -> Delta:
        """Makes a change with its initial values, on the CPU or on the device of ``given``.

        Args:
            spec: A checked specification.
            given: The weight ``(out, in)``; if :meth:`gradient_batches` is above 0, the mean first gradient with respect to it.
        """

    @abstractmethod
    def restore(self, spec: Spec, tensors: Mapping[str, Tensor], weight: Tensor) -> Delta:
        """Makes a change from the result of :meth:`Delta.stored`.

        Args:
            spec: The saved specification.
            tensors: The stored tensors, by name.
            weight: W, ``(out, in)``.

        Raises:
            InputError: The tensors do not fit.
        """

    def gradient_batches(self, options: Settings) -> int:
        """Returns the number of training batches for the mean first gradient; 0 if :meth:`make` needs the weight instead."""
        return 0

    def trim_tolerance(self, options: Settings) -> float:
        """Returns the share of the largest singular value of all changes below which singular values are removed after training, or 0."""
        return 0.0


class Adapter(Protocol):
    """A kind of adapter for a whole model. The other methods take the module that ``attach`` returned."""

    @property
    def options(self) -> type[Settings]:
        """Class of the adapter's options."""
        ...

    @property
    def defaults(self) -> Defaults:
        """Default training settings."""
        ...

    def attach(self, model: PreTrainedModel, request: AdapterRequest, evidence: Evidence | None) -> nn.Module:
        """Attaches the adapter to a model, in place, with only its own parameters trainable.

        At first the model's output is unchanged, or nearly so. Initial values depend on ``request.seed`` only; the global random
        generators must not be changed.

        Raises:
            InputError: The adapter does not fit, or needs evidence and got none; then the model is unchanged.
        """
        ...

    def after_step(self, adapted: nn.Module, step: int) -> None:
        """Updates the adapter after optimizer step ``step`` (from 1), before the gradients are cleared."""
        ...

    def penalty(self, adapted: nn.Module) -> Tensor | None:
        """Returns a scalar with gradients to add to the mean loss of every step, or None."""
        ...

    def state(self, adapted: nn.Module) -> dict[str, Tensor]:
        """Returns the state of :meth:`after_step` other than parameters, by name, for resuming a stopped run."""
        ...

    def put_state(self, adapted: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Restores the result of :meth:`state`."""
        ...

    def finish(self, adapted: nn.Module) -> None:
        """Brings the adapter into its final form; called once after training."""
        ...

    def factors(self, adapted: nn.Module) -> dict[str, LowRank]:
        """Returns the change of every module's original weight as two factors, by full name.

        Raises:
            InputError: The adapter cannot be written as two factors; the message suggests merging.
        """
        ...

    def merge(self, adapted: nn.Module) -> PreTrainedModel:
        """Merges the adapter into the weights, in float32 or better, and returns the model without it."""
        ...

    def save(self, adapted: nn.Module, folder: Path, base: str) -> None:
        """Writes the adapter without the model, as safetensors and JSON; equal adapters give equal bytes.

        Args:
            adapted: The result of ``attach``.
            folder: An empty folder.
            base: Base model, as its users name it.
        """
        ...


@runtime_checkable
class Grouped(Protocol):
    """An adapter whose parameters have different learning rates."""

    def parameter_groups(self, adapted: nn.Module, lr: float | None) -> Sequence[ParameterGroup]:
        """Returns all trained parameters, each in one group.

        Args:
            adapted: The result of ``attach``.
            lr: The user's learning rate; None for the adapter's default.
        """
        ...


ADAPTERS: Registry[Adapter | Method] = Registry("adapter", group="regraft.adapters")


def adapter_options(settings: RecoverSettings) -> Settings:
    """Returns the checked options of the settings' adapter.

    Raises:
        InputError: The adapter is not known.
        ConfigError: An option is not known or out of range; all problems are listed.
    """
    source = f"options of adapter '{settings.adapter}'"
    return checked(ADAPTERS.get(settings.adapter).options, option_values(settings.adapter_options), source)


def make_request(modules: Mapping[str, nn.Module], settings: RecoverSettings, ranks: RankPlan | None, seed: int) -> AdapterRequest:
    """Decides rank and alpha of every module: from the plan if there is one, else the same rank everywhere.

    Args:
        modules: The modules that can be adapted, by full name.
        settings: Adapter, rank, alpha and dropout.
        ranks: A rank for each module; modules without a rank, or with rank 0, get no adapter. None for the rank of the settings.
        seed: Seed of the initial values.

    Raises:
        InputError: A rank exceeds the limit of its module, or alpha was given for an adapter without one.
        ConfigError: An option of the adapter is wrong.
        PlanError: The plan names a module that the model lacks, a negative rank, or no module at all.
    """
    defaults, options = ADAPTERS.get(settings.adapter).defaults, adapter_options(settings)
    if settings.alpha is not None and defaults.alpha_per_rank is None:
        raise InputError(f"`alpha={settings.alpha:g}` has no effect on adapter '{settings.adapter}', which has no scale; leave it out")
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
    """Returns the specification of every module's adapter, each with its own seed."""
    specs: dict[str, Spec] = {}
    for name, rank in request.ranks.items():
        rows, columns = shape_of(modules[name])
        seed = derived_seed(request.seed, "adapter", name)
        specs[name] = Spec(name, rows, columns, rank, request.alphas[name], request.dropout, seed, request.options)
    return specs


def groups_by_rate(rates: Iterable[tuple[nn.Parameter, float]], eps: float | None) -> tuple[ParameterGroup, ...]:
    """Groups parameters by learning rate, in the order in which the rates first occur."""
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
            remedy = "lower it in the plan" if from_plan else f"use `rank={min(limits.values())}` or less"
            raise InputError(f"rank {rank} exceeds the limit {limits[name]} of '{name}' ({rows} x {columns}); {remedy}")
