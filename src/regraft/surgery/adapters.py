"""Injection, merging, saving and loading of adapters: the same steps for every kind of adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import AdaLoraConfig, LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from regraft.adapters import ADAPTERS, Adapter, Delta, Evidence, LowRank, Method, Spec, make_request
from regraft.adapters.linear_like import oriented, shape_of, weight_of
from regraft.adapters.peft_backed import NAME, PeftAdapter
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
    """A model with an injected adapter.

    Attributes:
        module: The module to train, with the inputs and outputs of the model.
        model: The model itself, whose own weights are frozen.
        adapter: The adapter, which can merge, save or remove itself.
        was_trainable: Names of the model's parameters that required gradients before the injection.
    """

    module: nn.Module
    model: PreTrainedModel
    adapter: Adapter
    was_trainable: frozenset[str]

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
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
    """Injects the adapter that the settings name into its target modules, in place, and freezes all other weights.

    Args:
        model: The model; its layers may differ in size or lack parts.
        settings: Adapter, rank, alpha, dropout, options and targets.
        ranks: A rank for each module, or None for the rank of the settings everywhere.
        seed: Seed of the initial values; the global generators are not changed.
        evidence: Training batches, which some adapters are initialised from.
        name: Name of the adapter, for several adapters of regraft on one model; see :func:`regraft.surgery.adapted.activate`.
        beside: The adapter that the model has already, or None.

    Raises:
        InputError: The adapter is not known, a rank or a target does not fit, or evidence is missing.
        PlanError: The plan does not fit the model; then the model is unchanged.
    """
    adapter = whole(ADAPTERS.get(settings.adapter), name)
    if beside is not None and not all(isinstance(one, PerModule) for one in (adapter, beside.adapter)):
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


def continued(adapted: PeftModel) -> Injected:
    """Takes a model with a LoRA of PEFT on it, so that training goes on from there: the adapter learns, everything else is frozen.

    Args:
        adapted: Changed in place: what requires gradients.

    Raises:
        InputError: It carries several adapters, one of another name, or one that is no LoRA.
    """
    names = list(adapted.peft_config)
    if names != [NAME]:
        raise InputError(
            f"the model carries the adapters {', '.join(names)}; training goes on with one, called '{NAME}': take off the others by "
            "delete_adapter()"
        )
    config = adapted.peft_config[NAME]
    if not isinstance(config, LoraConfig) or isinstance(config, AdaLoraConfig):
        remedy = "give the model without it" if config.is_prompt_learning else "fold it in with merge_and_unload()"
        raise InputError(f"training does not go on with an adapter of type {cast(Any, config.peft_type).value}; {remedy}")
    adapter = ADAPTERS.get("lora")
    assert isinstance(adapter, PeftAdapter)
    model = cast(PreTrainedModel, adapted.get_base_model())
    adapted.requires_grad_(False)
    cast(Any, adapted.base_model).enable_adapter_layers()  # it may have been switched off
    adapted.set_adapter(NAME)
    return Injected(adapted, model, adapter, frozenset())


def adapter_config(injected: Injected) -> LoraConfig:
    """Returns PEFT's config of an adapter that training goes on with."""
    return cast(LoraConfig, cast(PeftModel, injected.module).peft_config[NAME])


def whole(entry: Adapter | Method, name: str = "default") -> Adapter:
    """Returns the model-level adapter of a registry entry."""
    return PerModule(entry, name) if isinstance(entry, Method) else entry


def finish(injected: Injected) -> None:
    """Brings the adapter into its final form after training: trimmed or quantised, if its options say so."""
    injected.adapter.finish(injected.module)


def factors(injected: Injected) -> dict[str, LowRank]:
    """Returns the weight change of every module, relative to the original weights, as two factors.

    Raises:
        InputError: The adapter cannot be written as two factors; the message suggests merging.
    """
    return injected.adapter.factors(injected.module)


def merge(injected: Injected) -> PreTrainedModel:
    """Merges the adapter into the weights and returns the plain model, with ``requires_grad`` as before the injection.

    If the model has several adapters, all that are on are merged, each with its weight in the sum.
    """
    model = injected.adapter.merge(injected.module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in injected.was_trainable)
    return model


def save_adapter(injected: Injected, folder: Path, base: str) -> None:
    """Writes the adapter without the model.

    Args:
        injected: The model with its adapter.
        folder: An empty folder.
        base: Base model, as its users name it.
    """
    injected.adapter.save(injected.module, folder, base)


def load_adapter(model: PreTrainedModel, folder: Path, *, name: str = "default", beside: Injected | None = None) -> Injected:
    """Injects a saved adapter of regraft into its base model, in place.

    Args:
        model: The base model.
        folder: Folder with the adapter's files.
        name: Name of the adapter among several on one model.
        beside: The adapter that the model has already, or None.

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
    """Restores the adapter of one module from the file.

    Raises:
        ModelError: The stored tensors do not fit the module.
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
    """Loads the head that was trained together with the adapter.

    Raises:
        ModelError: The file has no head, or one of other sizes.
    """
    for name, parameter in head_parameters(model):
        if name not in stored.head or stored.head[name].shape != parameter.shape:
            raise ModelError(f"the adapter '{folder}' has no '{name}' of shape {list(parameter.shape)}; load it on a model of its own task")
        parameter.data.copy_(stored.head[name])


def _trainable(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
