"""What an adapter is to the rest of the house: something that attaches, merges and saves.

Which module gets which rank is decided here, once, for every adapter (:func:`make_request`); how the low-rank change is built is
the adapter's own matter. Injection with its checks, freezing, merging and saving are called in :mod:`regraft.surgery.adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from regraft.errors import InputError, PlanError, did_you_mean
from regraft.plans import RankPlan
from regraft.registry import Registry
from regraft.settings import RecoverSettings


@dataclass(frozen=True)
class AdapterRequest:
    """What is asked of an adapter.

    Attributes:
        ranks: Rank of every adapted module by its full name, in the order of the model.
        alphas: LoRA's alpha of the same modules: the change is ``alpha / rank`` times the product of the factors.
        dropout: Share of the adapter's inputs that is dropped while training.
        seed: Of the adapter's initial values.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float
    seed: int


class Adapter(Protocol):
    """One kind of adapter. The module that ``attach`` returns is what the other two are given back."""

    def attach(self, model: PreTrainedModel, request: AdapterRequest) -> nn.Module:
        """Puts the adapter on a model, in place, with only its own parameters trainable; the output is unchanged at first.

        Must not touch the global random generators: initial values follow from ``request.seed``.
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


ADAPTERS: Registry[Adapter] = Registry("adapter", group="regraft.adapters")


def make_request(modules: Mapping[str, nn.Linear], settings: RecoverSettings, ranks: RankPlan | None, seed: int) -> AdapterRequest:
    """Decides rank and alpha of every module: the plan's where there is one, else the same rank everywhere.

    Args:
        modules: The modules that can be adapted, by full name.
        settings: Rank, alpha and dropout.
        ranks: A rank for each module; modules it does not name, or names with rank 0, get no adapter.
        seed: Of the initial values.

    Raises:
        InputError: A rank exceeds what its module can hold.
        PlanError: The plan names a module that the model does not have, a negative rank, or no module at all.
    """
    if ranks is None:
        alpha = settings.alpha if settings.alpha is not None else 2.0 * settings.rank
        chosen = dict.fromkeys(modules, settings.rank)
        alphas = dict.fromkeys(modules, alpha)
    else:
        _check_names(modules, ranks)
        chosen = {name: ranks.ranks[name] for name in modules if ranks.ranks.get(name, 0) > 0}
        alphas = {name: ranks.alpha_per_rank * rank for name, rank in chosen.items()}
        if not chosen:
            raise PlanError("the rank plan gives no module a rank; give at least one module a rank of 1 or more")
    _check_limits(modules, chosen, from_plan=ranks is not None)
    return AdapterRequest(ranks=chosen, alphas=alphas, dropout=settings.dropout, seed=seed)


def _check_names(modules: Mapping[str, nn.Linear], plan: RankPlan) -> None:
    for name, rank in plan.ranks.items():
        if name not in modules:
            raise PlanError(
                f"the rank plan names '{name}', which this model does not have{did_you_mean(name, modules)}; "
                "make the plan for the model that is trained"
            )
        if rank < 0:
            raise PlanError(f"the rank plan gives '{name}' rank {rank}; ranks are 0 (no adapter) or more")


def _check_limits(modules: Mapping[str, nn.Linear], ranks: Mapping[str, int], *, from_plan: bool) -> None:
    limits = {name: min(modules[name].weight.shape) for name in ranks}
    for name, rank in ranks.items():
        if rank > limits[name]:
            rows, columns = modules[name].weight.shape
            remedy = "lower it in the plan" if from_plan else f"use --rank {min(limits.values())} or less"
            raise InputError(f"rank {rank} exceeds the limit {limits[name]} of '{name}' ({rows} x {columns}); {remedy}")
