"""Pruning of experts and of their channels: how many stay in each layer, and which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.groups.experts import CHOSEN_KEYS, channel_groups, expert_groups
from regraft.importance.experts import score_channels, score_experts
from regraft.models.layerwise import Walk
from regraft.pipelines.prune.resolved import ResolvedPrune
from regraft.plans import Cut, Group, Groups, PrunePlan, Scores, Shape
from regraft.selection.budget import NARROW_ALIGNMENTS, WIDE_ALIGNMENTS, best_units, closest_wanted
from regraft.settings import PruneSettings

TARGETS = ("experts", "expert_ffn")
_FEWEST_STEPS = 8  # of a wide alignment in a width
# torch multiplies the experts of a layer in one call, which takes rows of a multiple of 16 bytes: 8 values of 16 bits.
GROUPED = 8


@dataclass(frozen=True)
class Lane:
    """What is cut alike in one layer: its experts, or the channels of every one of them.

    Attributes:
        groups: One group of experts, or a group of channels for each expert.
        step: Number of which the units that stay are a multiple, unless all stay.
        floor: The fewest units that may stay.
    """

    groups: tuple[Group, ...]
    step: int
    floor: int

    @property
    def units(self) -> int:
        """Number of units of each group."""
        return self.groups[0].units

    @property
    def size(self) -> int:
        """Number of parameters that one unit of each group holds."""
        return sum(group.unit_parameters for group in self.groups)

    @property
    def levels(self) -> list[int]:
        """Numbers of units that may stay, the largest first."""
        return [self.units, *(level for level in range(self.units - 1, self.floor - 1, -1) if level % self.step == 0)]

    def costs(self, scores: Scores) -> list[float]:
        """Returns the share of the layer's score that is lost with the first unit, with the second, and so on."""
        ranked = [sorted(scores.values[group.name]) for group in self.groups]
        lost = [sum(units) for units in zip(*ranked, strict=True)]
        return [cost / (sum(lost) or 1.0) for cost in lost]


@dataclass(frozen=True)
class ExpertsWanted:
    """What is to go of the experts of a model.

    Attributes:
        groups: The experts of each layer, or the channels of each expert.
        lanes: The same, by layer.
        target: Number of parameters that are to go.
        count: Units that stay in every layer; None where layers differ.
        resolved: The settings.
    """

    groups: Groups
    lanes: tuple[Lane, ...]
    target: float
    count: int | None
    resolved: ResolvedPrune

    @property
    def shape(self) -> Shape:
        """Whether all layers keep the same number."""
        return "per-layer" if self.count is None else "uniform"


def of_experts(settings: PruneSettings) -> bool:
    """Returns whether experts, or channels of experts, are cut.

    Raises:
        InputError: They are cut together with something else.
    """
    if settings.experts is not None and "experts" not in settings.targets:
        raise InputError("`experts` is for `targets=experts`; leave it out, or name that target")
    if not set(settings.targets) & set(TARGETS):
        return False
    if len(settings.targets) > 1:
        mine = next(target for target in settings.targets if target in TARGETS)
        others = ",".join(target for target in settings.targets if target != mine)
        raise InputError(f"experts are cut by themselves; prune with `targets={mine}` first, and the result with `targets={others}`")
    if settings.experts is not None and _per_layer(settings):
        raise InputError("`experts` keeps the same number of experts in every layer; use `shape=uniform`, or `ratio` in its place")
    return True


def resolved_for_experts(settings: PruneSettings, seed: int) -> ResolvedPrune:
    """Returns the settings of pruning experts, which need text and no other decision before the model is known."""
    return ResolvedPrune(settings, seed, needs_text=True)


def experts_wanted(model: PreTrainedModel, settings: PruneSettings, seed: int, known: str | None = None) -> ExpertsWanted:
    """Returns what is to go of the experts of a model.

    Args:
        model: The model; its weights are read for its fingerprint only.
        settings: What is cut, and how much.
        seed: Seed of the calibration windows.
        known: The model's fingerprint, where it is known already.

    Raises:
        InputError: Fewer experts would stay than each token is sent to, or none would go; or layers that differ were to become alike.
        ModelError: The model has no experts, or they cannot be cut.
    """
    whole = settings.targets == ("experts",)
    groups = expert_groups(model, known) if whole else channel_groups(model, known)
    values = model.config.to_dict()
    chosen = next((int(values[key]) for key in CHOSEN_KEYS if values.get(key)), 1)
    by_layer = [tuple(here) for _, here in groupby(groups.groups, key=lambda group: group.layer)]
    align = 1 if whole else _align(settings, groups, by_layer)
    lanes = tuple(Lane(here, align, chosen if whole else align) for here in by_layer)
    resolved = resolved_for_experts(settings if whole else settings.model_copy(update={"align": align}), seed)
    wanted = ExpertsWanted(groups, lanes, settings.ratio * groups.parameters, None, resolved)
    if not _per_layer(settings):
        wanted = replace(wanted, count=_even_count(wanted, settings))
    _refuse_impossible(wanted, settings, chosen if whole else None)
    return wanted


def plan_experts(wanted: ExpertsWanted, walk: Walk) -> PrunePlan:
    """Returns the plan that keeps the units with the highest scores.

    Args:
        wanted: What is to go.
        walk: The model with its calibration windows.
    """
    score = score_experts if wanted.groups.groups[0].kind == "experts" else score_channels
    return plan_by_scores(wanted, score(walk, wanted.groups.fingerprint))


def plan_by_scores(wanted: ExpertsWanted, scores: Scores) -> PrunePlan:
    """Returns the plan that keeps the units with the highest scores: in each layer as many as are wanted."""
    groups, settings = wanted.groups, wanted.resolved.settings
    counts = _counts(wanted, scores)
    cuts: list[Cut] = []
    gone = 0
    for lane, count in zip(wanted.lanes, counts, strict=True):
        gone += (lane.units - count) * lane.size
        for group in lane.groups if count < lane.units else ():
            cuts.append(Cut(group.name, best_units(scores.values[group.name], count)))
    return PrunePlan(
        fingerprint=groups.fingerprint,
        criterion=scores.criterion,
        selection=scores.criterion,
        shape=wanted.shape,
        ratio=settings.ratio if settings.experts is None else gone / groups.parameters,
        align=wanted.lanes[0].step,
        parameters_before=groups.parameters,
        parameters_after=groups.parameters - gone,
        cuts=tuple(cuts),
        made_with={"settings": wanted.resolved.record(), "seed": wanted.resolved.seed, "windows_sha256": None},
    )


def _per_layer(settings: PruneSettings) -> bool:
    return settings.shape == "per-layer" and "shape" in settings.model_fields_set


def _align(settings: PruneSettings, groups: Groups, by_layer: list[tuple[Group, ...]]) -> int:
    """Returns the number of channels that go together: what is asked for, or the widest that meets the ratio closely enough."""
    if settings.align != "auto":
        if settings.align % GROUPED:
            raise InputError(
                f"`align={settings.align}` leaves experts that torch does not multiply in one call; use a multiple of {GROUPED}, or `auto`"
            )
        return settings.align
    units = min(here[0].units for here in by_layer)
    each = sum(group.unit_parameters for group in groups.groups)
    for align in (*(wide for wide in WIDE_ALIGNMENTS if _FEWEST_STEPS * wide <= units), *NARROW_ALIGNMENTS):
        kept = align * round((units - settings.ratio * groups.parameters / each) / align)
        missed = abs((units - kept) * each / groups.parameters - settings.ratio)
        if align == GROUPED or missed <= closest_wanted(align, settings.ratio):
            return align
    return GROUPED


def _even_count(wanted: ExpertsWanted, settings: PruneSettings) -> int:
    """Returns how many units stay in every layer.

    Raises:
        InputError: The layers differ already.
    """
    before = {lane.units for lane in wanted.lanes}
    if len(before) > 1:
        raise InputError(f"layers have {min(before)} to {max(before)} of them, which no equal cut leaves alike; use `shape=per-layer`")
    if settings.experts is not None:
        return settings.experts
    step, units = wanted.lanes[0].step, before.pop()
    return min(units, step * round((units - wanted.target / sum(lane.size for lane in wanted.lanes)) / step))


def _refuse_impossible(wanted: ExpertsWanted, settings: PruneSettings, chosen: int | None) -> None:
    """Refuses what leaves too few, or everything.

    Raises:
        InputError: As said.
    """
    total = wanted.groups.parameters
    most = sum((lane.units - lane.floor) * lane.size for lane in wanted.lanes) / total
    asked = f"experts={settings.experts}" if settings.experts is not None else f"ratio={settings.ratio:g}"
    count, units = wanted.count, wanted.lanes[0].units
    if (count is not None and count < wanted.lanes[0].floor) or (count is None and settings.ratio > most):
        leaves = f"leaves {count} of {units}" if count is not None else "leaves too few"
        if chosen is None:
            raise InputError(f"`{asked}` {leaves} channels of an expert; keep {wanted.lanes[0].floor} or more: at most {most:.3f} can go")
        left = f"{count} experts" if count is not None else "too few experts"
        raise InputError(
            f"`{asked}` leaves {left} in a layer, and each token is sent to {chosen}; keep {chosen} or more, which removes at "
            f"most {most:.3f} of the parameters"
        )
    least = wanted.lanes[0].step * sum(lane.size for lane in wanted.lanes) / total
    if count is not None and count >= units:
        what = "an expert of every layer is" if chosen is not None else "the smallest step in every expert is"
        remedy = "raise `ratio`, or give a smaller number with `experts`" if chosen is not None else "raise `ratio`, or lower `align`"
        units_of = "experts" if chosen is not None else "channels"
        raise InputError(f"{count} of {units} {units_of} are all of them: {what} {least:.3f} of the parameters; {remedy}")


def _counts(wanted: ExpertsWanted, scores: Scores) -> list[int]:
    """Returns how many units stay in each layer: as many as are wanted, or where layers differ, where the least of their score is lost."""
    if wanted.count is not None:
        return [wanted.count] * len(wanted.lanes)
    steps: list[tuple[float, int, int, int]] = []
    for index, lane in enumerate(wanted.lanes):
        costs = lane.costs(scores)
        for more, less in pairwise(lane.levels):
            size = (more - less) * lane.size
            lost = sum(costs[lane.units - more : lane.units - less])
            steps.append((lost / size, -more, index, size))
    kept = [lane.units for lane in wanted.lanes]
    gone = 0
    for _, _, index, size in sorted(steps):  # the costs of a layer ascend, so that its steps come in their order
        if gone + size / 2 > wanted.target:
            break
        gone += size
        kept[index] -= size // wanted.lanes[index].size
    return kept
