"""Puts an adapter on a model, folds it in, saves it: the same steps for every adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from regraft.adapters import ADAPTERS, Adapter, make_request
from regraft.errors import PlanError
from regraft.models.view import ModelView
from regraft.plans import RankPlan
from regraft.settings import RecoverSettings


@dataclass(frozen=True)
class Injected:
    """A model with an adapter on it.

    Attributes:
        module: What is trained: it takes the inputs of the model and gives its outputs.
        model: The model inside, whose own weights are frozen.
        adapter: How to take the adapter off again.
        was_trainable: Names of the model's parameters that required gradients before.
    """

    module: nn.Module
    model: PreTrainedModel
    adapter: Adapter
    was_trainable: frozenset[str]

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)


def inject(model: PreTrainedModel, settings: RecoverSettings, ranks: RankPlan | None, seed: int) -> Injected:
    """Puts the adapter that the settings name on all linear projections of a model, in place, and freezes the rest.

    Args:
        model: Of a known family; layers may differ in size or lack parts.
        settings: Which adapter, its rank, alpha and dropout.
        ranks: A rank for each module, or None for the same everywhere.
        seed: Of the initial values; the global generators are not touched.

    Raises:
        InputError: The adapter is not known or a rank exceeds what its module can hold.
        PlanError: The plan does not fit the model. The model is unchanged then.
    """
    adapter = ADAPTERS.get(settings.adapter)
    request = make_request(ModelView(model).adapted_modules(), settings, ranks, seed)
    was_trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    injected = Injected(adapter.attach(model, request), model, adapter, was_trainable)
    promised = ranks.trainable_parameters if ranks is not None and settings.adapter == "lora" else 0
    if promised and promised != injected.trainable_parameters:
        count = injected.trainable_parameters
        merge(injected)
        raise PlanError(
            f"the rank plan counts {promised:,} trainable parameters, but on this model it costs {count:,}; "
            "it was made for a model of other sizes: make it again"
        )
    return injected


def merge(injected: Injected) -> PreTrainedModel:
    """Folds the adapter into the weights and returns the plain model, its parameters as trainable as they were before."""
    model = injected.adapter.merge(injected.module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in injected.was_trainable)
    return model


def save_adapter(injected: Injected, folder: Path, base: str) -> None:
    """Writes the adapter alone.

    Args:
        injected: The model with its adapter.
        folder: An empty folder.
        base: The model that the adapter belongs to, as its users name it.
    """
    injected.adapter.save(injected.module, folder, base)
