"""Puts an adapter on a model, folds it in, saves it and loads it: the same steps for every adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from regraft.adapters import ADAPTERS, Adapter, Delta, Evidence, LowRank, Method, Spec, make_request
from regraft.adapters.linear_like import oriented, shape_of, weight_of
from regraft.errors import InputError, ModelError, PlanError
from regraft.models.classifier import head_parameters
from regraft.plans import RankPlan
from regraft.settings import RecoverSettings, checked
from regraft.surgery.adapted import activate as activate
from regraft.surgery.adapter_files import Stored, base_fingerprint, is_master, read_master
from regraft.surgery.per_module import PerModule
from regraft.surgery.targets import find_targets


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


def inject(
    model: PreTrainedModel,
    settings: RecoverSettings,
    ranks: RankPlan | None,
    seed: int,
    evidence: Evidence | None = None,
    *,
    name: str = "default",
    beside: Injected | None = None,
) -> Injected:
    """Puts the adapter that the settings name on the modules that they name, in place, and freezes the rest.

    Args:
        model: Layers may differ in size or lack parts.
        settings: Which adapter, its rank, alpha, dropout, options and targets.
        ranks: A rank for each module, or None for the same everywhere.
        seed: Of the initial values; the global generators are not touched.
        evidence: Training batches, which some adapters start from.
        name: Of the adapter among several of ours on one model; see :func:`activate`.
        beside: The adapter that the model carries already.

    Raises:
        InputError: The adapter is not known, a rank or a target does not fit, or evidence is missing.
        PlanError: The plan does not fit the model. The model is unchanged then.
    """
    adapter = whole(ADAPTERS.get(settings.adapter), name)
    if beside is not None and not (isinstance(adapter, PerModule) and isinstance(beside.adapter, PerModule)):
        raise InputError(f"adapter '{settings.adapter}' does not stand beside another one; those of PEFT take a model for themselves")
    request = make_request(find_targets(model, settings.targets), settings, ranks, seed)
    was_trainable = beside.was_trainable if beside is not None else _trainable(model)
    injected = Injected(adapter.attach(model, request, evidence), model, adapter, was_trainable)
    promised = ranks.trainable_parameters if ranks is not None and settings.adapter == "lora" else 0
    if promised and promised != injected.trainable_parameters:
        count = injected.trainable_parameters
        merge(injected)
        raise PlanError(
            f"the rank plan counts {promised:,} trainable parameters, but on this model it costs {count:,}; "
            "it was made for a model of other sizes: make it again"
        )
    return injected


def whole(entry: Adapter | Method, name: str = "default") -> Adapter:
    """Returns an adapter for whole models of what the registry holds."""
    return PerModule(entry, name) if isinstance(entry, Method) else entry


def finish(injected: Injected) -> None:
    """Makes the adapter what is kept after training: trimmed or quantised, where its options say so."""
    injected.adapter.finish(injected.module)


def factors(injected: Injected) -> dict[str, LowRank]:
    """Returns the change of every module with respect to the original weights as two factors.

    Raises:
        InputError: The adapter has no such form; the message offers the merge.
    """
    return injected.adapter.factors(injected.module)


def merge(injected: Injected) -> PreTrainedModel:
    """Folds the adapter into the weights and returns the plain model, its parameters as trainable as they were before.

    Of adapters side by side all that are switched on are folded in, each with its weight.
    """
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


def load_adapter(model: PreTrainedModel, folder: Path, *, name: str = "default", beside: Injected | None = None) -> Injected:
    """Puts an adapter of ours that was saved on its base model, in place.

    Args:
        model: The base.
        folder: A compact master.
        name: Of the adapter among several.
        beside: The adapter that the model carries already.

    Raises:
        ModelError: The adapter is damaged, or was saved for another base.
    """
    if not is_master(folder):
        raise ModelError(f"'{folder}' holds no adapter of regraft (no adapter.json); give the folder of one")
    stored = read_master(folder)
    seen = base_fingerprint(model)
    if stored.base_fingerprint != seen:
        raise ModelError(
            f"the adapter '{folder}' was saved for another base: '{stored.base}' with fingerprint {stored.base_fingerprint}, "
            f"this model has {seen}; load it on the model it was trained on"
        )
    adapter = whole(ADAPTERS.get(stored.method), name)
    assert isinstance(adapter, PerModule)
    was_trainable = beside.was_trainable if beside is not None else _trainable(model)
    deltas = {module: _restored(adapter.method, module, stored, model, folder) for module in stored.modules}
    adapter.put(model, deltas)
    _put_head(model, stored, folder)
    return Injected(model, model, adapter, was_trainable)


def _restored(method: Method, name: str, stored: Stored, model: PreTrainedModel, folder: Path) -> Delta:
    """Makes one change again from the file.

    Raises:
        ModelError: What is stored does not fit.
    """
    try:
        module = find_targets(model, (name,))[name]
        rows, columns = shape_of(module)
        options = checked(method.options, stored.options, f"'{folder}'")
        spec = Spec(name, rows, columns, options=options, **stored.modules[name])
        weight = oriented(module, weight_of(module)).detach()
        delta = method.restore(spec, stored.tensors[name], weight)
        same = delta.delta(weight.new_zeros(1, columns).float().to(next(delta.parameters()).device)).shape == (1, rows)
    except (KeyError, RuntimeError, TypeError, IndexError) as error:
        raise ModelError(f"the adapter '{folder}' does not fit '{name}' ({error}); copy it again, or train it again") from None
    if not same:
        raise ModelError(f"the adapter '{folder}' does not fit '{name}' ({rows} x {columns}); train it again")
    return delta


def _put_head(model: nn.Module, stored: Stored, folder: Path) -> None:
    """Puts a head that was trained beside the adapter in place.

    Raises:
        ModelError: The file has none, or one of other sizes.
    """
    for name, parameter in head_parameters(model):
        if name not in stored.head or stored.head[name].shape != parameter.shape:
            raise ModelError(f"the adapter '{folder}' has no '{name}' of shape {list(parameter.shape)}; load it on a model of its own task")
        parameter.data.copy_(stored.head[name])


def _trainable(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
