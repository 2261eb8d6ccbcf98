"""The slots of a rank search: their modules, the cost of one more rank, and their features before any recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from regraft.adapters.linear_like import shape_of, weight_of
from regraft.allocation.features import ADALORA, EVA, GRADIENT_ENERGY, IMPORTANCE_REMOVED, SHARE_PRUNED
from regraft.data.text import Corpus
from regraft.data.tokens import calibration_windows, window_tokens
from regraft.errors import PlanError
from regraft.groups.discover import discover
from regraft.importance.gradient_energy import gradient_energy
from regraft.importance.input_variance import explained_variance
from regraft.models.load import Loaded, require_tokenizer
from regraft.models.view import ModelView
from regraft.paired.adalora_importance import triplet_importance
from regraft.pipelines.prune.removal_record import in_all
from regraft.plans import RankSlot
from regraft.progress import Say
from regraft.settings import CALIBRATION_TOKENS, AllocateSettings, RecoverSettings

Curves = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Bare:
    """A slot without features.

    Attributes:
        name: ``layers.3`` or the module's full name.
        layer: Index of the decoder layer.
        modules: The adapted modules by full name.
    """

    name: str
    layer: int
    modules: Mapping[str, nn.Module]

    def plain(self, features: Mapping[str, float] | None = None) -> RankSlot:
        """Returns the slot as a plan value, with features."""
        shapes = [shape_of(module) for module in self.modules.values()]
        return RankSlot(
            name=self.name,
            modules=tuple(self.modules),
            layer=self.layer,
            parameters_per_rank=sum(sum(shape) for shape in shapes),
            limit=min(min(shape) for shape in shapes),
            features=dict(features or {}),
        )


def bare_slots(view: ModelView, granularity: Literal["layer", "module"]) -> list[Bare]:
    """Returns the slots in the order of the model; a layer without projections has no slot.

    Raises:
        PlanError: No layer has a module that takes an adapter.
    """
    modules = view.adapted_modules()
    found: list[Bare] = []
    for index in range(len(view.layers)):
        own = {name: module for name, module in modules.items() if name.startswith(f"{view.layer_name(index)}.")}
        if granularity == "layer" and own:
            found.append(Bare(f"layers.{index}", index, own))
        elif granularity == "module":
            found += [Bare(name, index, {name: module}) for name, module in own.items()]
    if not found:
        raise PlanError(
            f"none of the {len(view.layers)} layers has a linear projection that takes an adapter; "
            "ranks can be allocated in families whose projections are nn.Linear"
        )
    return found


def measured_slots(
    loaded: Loaded, bare: Sequence[Bare], train: Corpus, settings: AllocateSettings, recover: RecoverSettings, *, seed: int, say: Say
) -> tuple[RankSlot, ...]:
    """Returns the slots of a search with their features.

    The features are the pruned share and the removed importance (if the model's folder records them), the energy of the first gradients and
    the variance of the inputs; for the method ``adalora`` also the importance of its triplets, which needs a short training.

    Args:
        loaded: The pruned model; it is restored at the end.
        bare: Slots of the model, from :func:`bare_slots`.
        train: Training data of the recovery.
        settings: Granularity, ranks, windows, method.
        recover: Settings of a full recovery.
        seed: Seed of the windows and of AdaLoRA.
        say: Called with the name of each step.

    Raises:
        DataError: The text is shorter than one window.
    """
    modules = {name: module for slot in bare for name, module in slot.modules.items()}
    ranks = tuple(sorted(set(settings.ranks)))
    curves: dict[str, Curves] = {}
    windows = _windows(loaded, train, settings, seed)
    say("gradients")
    weights = {f"{name}.weight": weight_of(module) for name, module in modules.items()}
    energy = gradient_energy(loaded.model, weights, windows, ranks, torch.Generator().manual_seed(seed))
    curves[GRADIENT_ENERGY] = {name.removesuffix(".weight"): values for name, values in energy.items()}
    say("variance of the inputs")
    curves[EVA] = explained_variance(loaded.model, modules, windows, ranks)
    if settings.method == "adalora":
        say("AdaLoRA")
        steps = max(1, round(settings.adalora_share * recover.steps))
        tokenizer = require_tokenizer(loaded)
        curves[ADALORA] = triplet_importance(loaded.model, tokenizer, train, tuple(modules), ranks, recover, steps=steps, seed=seed)
    damage = damage_of(loaded, bare)
    return tuple(_slot(slot, ranks, curves, damage.get(slot.name, {})) for slot in bare)


def _slot(slot: Bare, ranks: Sequence[int], curves: Mapping[str, Curves], damage: Mapping[str, float]) -> RankSlot:
    features = dict(damage)
    for name, curve in curves.items():
        features |= {f"{name}@{rank}": sum(curve[module][place] for module in slot.modules) for place, rank in enumerate(ranks)}
    return slot.plain(features)


def _windows(loaded: Loaded, train: Corpus, settings: AllocateSettings, seed: int) -> Tensor:
    """Draws windows from the training text, which the recovery's gradients will come from."""
    seq_len = window_tokens(None, CALIBRATION_TOKENS, loaded.model.config, "seq_len")
    return calibration_windows(train, require_tokenizer(loaded), settings.samples, seq_len, seed)


def damage_of(loaded: Loaded, slots: Sequence[Bare]) -> dict[str, dict[str, float]]:
    """Returns pruned share and removed importance of every slot, from the record of the model's folder; empty without a record.

    A module's share is computed from the remaining units of its groups: a matrix that lost half of its outputs and half of its inputs has a
    quarter left.
    """
    record = in_all(loaded.provenance)
    groups = [group for group in discover(loaded.model).groups if group.name in record] if record else []
    if not groups:
        return {}
    touching = {group.name: {member.parameter.rpartition(".")[0] for member in group.members} for group in groups}
    found: dict[str, dict[str, float]] = {}
    for slot in slots:
        near = [group for group in groups if touching[group.name] & slot.modules.keys()]
        now = {name: float(weight_of(module).numel()) for name, module in slot.modules.items()}
        left = {name: math.prod(group.units / record[group.name][0] for group in near if name in touching[group.name]) for name in now}
        before = sum(count / left[name] for name, count in now.items())
        found[slot.name] = {
            SHARE_PRUNED: max(0.0, 1.0 - sum(now.values()) / before),
            IMPORTANCE_REMOVED: sum(record[group.name][1] for group in near),
        }
    return found
