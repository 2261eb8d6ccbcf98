"""Pruning of experts: which experts of a mixture stay, the same number in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.groups.experts import CHOSEN_KEYS, expert_groups
from regraft.importance.experts import NAME, score_experts
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.plans import Cut, Groups, PrunePlan, Scores
from regraft.selection.budget import best_units
from regraft.settings import PruneSettings


@dataclass(frozen=True)
class ExpertsWanted:
    """How many experts stay in every layer.

    Attributes:
        groups: The experts of each layer.
        count: Number that stays in each.
        resolved: The settings.
    """

    groups: Groups
    count: int
    resolved: ResolvedPrune


def of_experts(settings: PruneSettings) -> bool:
    """Returns whether experts are cut.

    Raises:
        InputError: They are cut together with something else, or from a checkpoint that is read layer by layer.
    """
    if "experts" not in settings.targets:
        if settings.experts is not None:
            raise InputError("`experts` is for `targets=experts`; leave it out, or name that target")
        return False
    if set(settings.targets) != {"experts"}:
        others = ",".join(target for target in settings.targets if target != "experts")
        raise InputError(f"experts are cut by themselves; prune with `targets=experts` first, and the result with `targets={others}`")
    if settings.memory is not None:
        raise InputError("`memory` does not read experts one layer at a time yet; leave it out")
    if settings.shape == "per-layer" and "shape" in settings.model_fields_set:
        raise InputError("`targets=experts` keeps the same number of experts in every layer; use `shape=uniform`")
    return True


def experts_wanted(model: PreTrainedModel, settings: PruneSettings, seed: int) -> ExpertsWanted:
    """Returns the experts of a model, and how many of them stay in every layer.

    Raises:
        InputError: Fewer would stay than each token is sent to, or none would go.
        ModelError: The model has no experts, or they cannot be cut.
    """
    groups = expert_groups(model)
    before = groups.groups[0].units
    values = model.config.to_dict()
    chosen = next((int(values[key]) for key in CHOSEN_KEYS if values.get(key)), 1)
    each = sum(group.unit_parameters for group in groups.groups)
    removed = round(settings.ratio * groups.parameters / each)
    count = settings.experts if settings.experts is not None else before - removed
    if count < chosen:
        asked = f"experts={settings.experts}" if settings.experts is not None else f"ratio={settings.ratio:g}"
        most = (before - chosen) * each / groups.parameters
        raise InputError(
            f"`{asked}` leaves {count} experts in a layer, and each token is sent to {chosen}; keep {chosen} or more, which removes at "
            f"most {most:.3f} of the parameters"
        )
    if count >= before:
        raise InputError(
            f"{count} of {before} experts are all of them: an expert of every layer is {each / groups.parameters:.3f} of the parameters; "
            "raise `ratio`, or give a smaller number with `experts`"
        )
    return ExpertsWanted(groups, count, ResolvedPrune(settings, seed, needs_text=True))


def plan_experts(wanted: ExpertsWanted, scores: Scores) -> PrunePlan:
    """Returns the plan that keeps the experts with the highest scores in each layer."""
    groups, count = wanted.groups, wanted.count
    cuts = tuple(Cut(group.name, best_units(scores.values[group.name], count)) for group in groups.groups)
    gone = sum((group.units - count) * group.unit_parameters for group in groups.groups)
    return PrunePlan(
        fingerprint=groups.fingerprint,
        criterion=scores.criterion,
        selection=NAME,
        shape="uniform",
        ratio=wanted.resolved.settings.ratio if wanted.resolved.settings.experts is None else gone / groups.parameters,
        align=1,
        parameters_before=groups.parameters,
        parameters_after=groups.parameters - gone,
        cuts=cuts,
        made_with={"settings": wanted.resolved.record(), "seed": wanted.resolved.seed, "windows_sha256": None},
    )


def prune_experts(model: PreTrainedModel, wanted: ExpertsWanted, windows: Tensor | None, plan: PrunePlan | None) -> PrunePlan:
    """Returns the plan: a given one, or that of the scores on calibration windows."""
    if plan is not None:
        return plan
    assert windows is not None
    return plan_experts(wanted, score_experts(model, wanted.groups.fingerprint, windows))
