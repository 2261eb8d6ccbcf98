"""Resolution of "auto": settings become a :class:`ResolvedPrune`, in which only the alignment may still be undecided.

What can be decided from the settings alone is decided by :func:`resolve`, before a model is read; the shape of the layers needs the
model's groups (:func:`with_shape`).

Two strategies define the defaults and the limits: :data:`IN_MEMORY`, where the model is in memory and can be run any number of times, and
:data:`STREAMED`, where a memory limit allows one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedConfig

from regraft.errors import InputError
from regraft.groups.traced import Traced
from regraft.importance import CRITERIA
from regraft.models.build import why_layers_are_alike
from regraft.models.family import Family
from regraft.models.view import ModelView
from regraft.pipelines.prune.effort import EFFORTS
from regraft.plans import WHOLE, GroupKind, Groups, PrunePlan
from regraft.selection import SELECTORS, Budget
from regraft.selection.budget import MOST_MISSED
from regraft.settings import PruneSettings, Target
from regraft.surgery.refit_layerwise import RefitMethod
from regraft.surgery.refit_predictions import refitting_bytes

Reconstruct = Literal["divergence", "least_squares", "mean", "none"]
# Re-fitting to the dense model's predictions is the default up to here, which is about half a billion parameters.
MOST_REFITTING_BYTES = 8_000_000_000
MOST_OF_FFN = 0.5  # of the channels, before heads are cut too although no stock class holds the result
# Where the word of the settings is not that of the groups.
KIND_OF: dict[Target, GroupKind] = {
    "heads": "heads",
    "ffn": "ffn",
    "query_heads": "query_heads",
    "mixer_heads": "mixer_heads",
    "residual": "residual",
    "layers": "layer",
    "attention": "attention",
    "mlp": "mlp",
    "vocabulary": "vocabulary",
    "experts": "experts",
    "expert_ffn": "expert_ffn",
}


@dataclass(frozen=True)
class ResolvedPrune:
    """Settings of pruning in which every "auto" is replaced by a value.

    Attributes:
        settings: Settings with values in place of "auto". Only ``align`` may still be "auto"; then the selection tries several.
        seed: Seed for the calibration windows and for random scores.
        needs_text: Whether planning needs calibration text.
        notes: Remarks for the user on the chosen values, a line each.
    """

    settings: PruneSettings
    seed: int
    needs_text: bool
    notes: tuple[str, ...] = ()

    @property
    def refit(self) -> Reconstruct | None:
        """Method that re-fits the projections that read pruned channels; None for no re-fit."""
        method = self.settings.reconstruct
        assert method != "auto"
        return None if method == "none" else method

    @property
    def layerwise(self) -> RefitMethod | None:
        """Method of the re-fit layer by layer; the one to the predictions goes on from where least squares ends."""
        return None if self.refit is None else "mean" if self.refit == "mean" else "least_squares"

    @property
    def kinds(self) -> tuple[GroupKind, ...]:
        """The kinds of groups that are cut."""
        return kinds_wanted(self.settings)

    def record(self, plan: PrunePlan | None = None) -> dict[str, Any]:
        """Returns the settings that affect the pruned model, as plain JSON types; with a plan, the alignment is the plan's."""
        values = self.settings.decisive()
        return values if plan is None else values | {"align": plan.align}


@dataclass(frozen=True)
class Strategy:
    """Defaults and limits for a model that is in memory, or for one that is streamed from disk.

    Attributes:
        select: The best selector for criteria that read text.
        reconstruct: The best re-fit.
        depth: The best criterion for the removal of layers, attention and feed-forward parts.
        refuse: Raises an InputError for resolved settings that are not possible here.
    """

    select: Literal["knapsack", "uniform"]
    reconstruct: Reconstruct
    depth: Literal["removal", "block_influence"]
    refuse: Callable[[PruneSettings], None]


def _refuse_when_streamed(settings: PruneSettings) -> None:
    if SELECTORS.get(settings.select).needs_curves:
        needs = f"budget={settings.budget}" if settings.budget != "parameters" else f"select={settings.select}"
        raise InputError(
            f"`{needs}` needs measurements of the whole model, which `memory` leaves no room for; use `select=global` or `select=uniform` "
            "with `budget=parameters`, or leave `memory` out"
        )
    if settings.rounds > 1:
        raise InputError(
            f"`rounds={settings.rounds}` prunes the pruned model again, which `memory` leaves no room for; use `rounds=1`, and prune "
            "the result again for another round"
        )
    if settings.reconstruct == "divergence":
        raise InputError(
            "`reconstruct=divergence` runs the whole model many times over, which `memory` leaves no room for; "
            "use `reconstruct=least_squares`, or leave `memory` out"
        )
    if goes_whole(settings) and settings.depth != STREAMED.depth:
        raise InputError(
            f"`depth={settings.depth}` looks at several layers at once, which `memory` leaves no room for; "
            f"use `depth={STREAMED.depth}`, or leave `memory` out"
        )
    if CRITERIA.get(settings.criterion).in_nats and not set(kinds_wanted(settings)) <= set(WHOLE):
        raise InputError(
            f"`criterion={settings.criterion}` runs the whole model back, which `memory` leaves no room for; "
            "use `criterion=surgeon`, or leave `memory` out"
        )


IN_MEMORY = Strategy("knapsack", "divergence", "removal", lambda settings: None)
STREAMED = Strategy("uniform", "least_squares", "block_influence", _refuse_when_streamed)


def resolve(settings: PruneSettings, view: ModelView | None = None, seed: int = 0) -> ResolvedPrune:
    """Replaces every "auto". With a criterion that reads no text, nothing else reads text; otherwise the strategy's defaults apply.

    Args:
        settings: The user's settings.
        view: The model. Without it, names and contradictions are checked, and a model of moderate size is assumed.
        seed: Seed for the calibration windows and for random scores.

    Raises:
        InputError: The criterion is unknown, the budget needs a selector that was not chosen, or the strategy rules something out.
    """
    if not settings.targets:
        raise InputError(f"`targets` names nothing to prune; name one or more of {', '.join(KIND_OF)}")
    strategy = IN_MEMORY if settings.memory is None else STREAMED
    _check_bridge(settings)
    settings = _with_effort(settings, strategy, view)
    with_text = CRITERIA.get(settings.criterion).needs_text
    select, notes = _select(settings, strategy, with_text)
    reconstruct, more = _reconstruct(settings, strategy, with_text, view)
    depth = (strategy.depth if goes_whole(settings) else IN_MEMORY.depth) if settings.depth == "auto" else settings.depth
    if goes_whole(settings) and not set(WHOLE) <= set(CRITERIA.get(depth).scores):
        fit = [name for name in CRITERIA.names() if set(WHOLE) <= set(CRITERIA.get(name).scores)]
        raise InputError(f"`depth={depth}` is a criterion of units, not of layers and their parts; use one of {', '.join(fit)}")
    decided = settings.model_copy(update={"select": select, "reconstruct": reconstruct, "depth": depth})
    strategy.refuse(decided)
    if "vocabulary" in settings.targets and select != "knapsack":
        raise InputError(
            f"a vocabulary beside other targets is weighed against them by measured damage, which `select={select}` does not; use "
            "`select=knapsack` and a criterion that reads text, or `targets=vocabulary` alone"
        )
    return ResolvedPrune(
        settings=decided,
        seed=seed,
        needs_text=with_text or SELECTORS.get(select).needs_curves or reconstruct != "none" or goes_whole(settings),
        notes=notes + more,
    )


def resolve_replay(settings: PruneSettings, view: ModelView | None, seed: int) -> ResolvedPrune:
    """Replaces every "auto" for a given plan, where only the re-fit is still open.

    Raises:
        InputError: The re-fit needs the model in memory, and ``memory`` is set.
    """
    strategy = IN_MEMORY if settings.memory is None else STREAMED
    settings = _with_effort(settings, strategy, view)
    way = resolve(settings.model_copy(update={"memory": None, "reconstruct": "none"}), view, seed)
    reconstruct, _ = _reconstruct(settings, strategy, CRITERIA.get(settings.criterion).needs_text, view)
    if reconstruct == "divergence":
        strategy.refuse(settings.model_copy(update={"select": "uniform", "rounds": 1, "reconstruct": reconstruct}))
    decided = way.settings.model_copy(update={"memory": settings.memory, "reconstruct": reconstruct})
    return ResolvedPrune(decided, seed, needs_text=reconstruct != "none")


def with_shape(resolved: ResolvedPrune, groups: Groups, family: Family) -> ResolvedPrune:
    """Returns settings with a shape and targets that the model can have in a stock class, where nobody asked for others, with a remark.

    Layers cannot all be alike where they differ already, where some of them are spared, or where attention or feed-forward parts of
    single layers are removed: these are pruned per-layer. If ``uniform`` was asked for, :func:`budget_of` refuses these. Heads stay where
    the stock class ties their number to the width, such as GPT-2's, as long as the feed-forward parts alone can give what is asked.
    """
    settings = resolved.settings
    if settings.shape != "uniform" or "shape" in settings.model_fields_set:
        return resolved
    reason = _why_not_uniform(settings, groups)
    if reason is None:
        return _without_tied_heads(resolved, groups, family)
    note = f"shape: per-layer, because {reason}"
    return replace(resolved, settings=settings.model_copy(update={"shape": "per-layer"}), notes=(*resolved.notes, note))


def _without_tied_heads(resolved: ResolvedPrune, groups: Groups, family: Family) -> ResolvedPrune:
    settings = resolved.settings
    tied = family.head_size == "derived" and bool(family.keys.ffn) and bool(groups.of("heads"))
    ours = groups.family.startswith("regraft_")
    if not tied or ours or "targets" in settings.model_fields_set or settings.budget != "parameters":
        return resolved
    ffn = sum(group.units * group.unit_parameters for group in groups.of("ffn"))
    if settings.ratio * groups.parameters <= MOST_OF_FFN * ffn:
        note = (
            f"targets: ffn, because the stock class of {family.model_type} ties its heads to its width; `targets=heads,ffn` cuts both, "
            "into a class of ours"
        )
        return replace(resolved, settings=settings.model_copy(update={"targets": ("ffn",)}), notes=(*resolved.notes, note))
    note = (
        f"heads are cut too, into a class of ours: for this ratio the feed-forward parts alone would lose more than {MOST_OF_FFN:.0%} of "
        f"their channels, and the stock class of {family.model_type} ties its heads to its width"
    )
    return replace(resolved, notes=(*resolved.notes, note))


def refuse_unlike_layers(settings: PruneSettings, groups: Groups, config: PreTrainedConfig) -> None:
    """Refuses a shape that no class of the family holds, before anything is measured.

    Args:
        settings: Settings with the shape decided.
        groups: The groups that are cut.
        config: Config of the model.

    Raises:
        InputError: Layers of this family have equally many units of one of the kinds.
    """
    if settings.shape == "uniform":
        return
    why = _why_alike(groups, config)
    if why:
        raise InputError(f"{why}; prune all `layers` with `shape=uniform`")


def _why_alike(groups: Groups, config: PreTrainedConfig) -> str:
    """Returns why layers have equally many units of a kind that is cut; empty if they may differ in all."""
    kinds = dict.fromkeys(group.kind for group in groups.groups if group.layer is not None and group.kind not in WHOLE)
    return next((why for kind in kinds if (why := why_layers_are_alike(config, kind))), "")


def only_wanted(groups: Groups, settings: PruneSettings) -> Groups:
    """Returns the groups of the kinds that the settings cut."""
    wanted = kinds_wanted(settings)
    return replace(groups, groups=tuple(group for group in groups.groups if group.kind in wanted))


def _why_not_uniform(settings: PruneSettings, groups: Groups) -> str | None:
    parts = [target for target in settings.targets if target in ("attention", "mlp")]
    if parts:
        return f"`targets={parts[0]}` is removed in some layers and stays in others"
    if len(layers_in(settings.layers, groups.layers)) < groups.layers:
        return f"`layers={settings.layers}` prunes some layers and spares others"
    return layers_differ(groups, kinds_wanted(settings))


def layers_differ(groups: Groups, kinds: Collection[GroupKind]) -> str | None:
    """Returns in what the layers of a model differ already, in words; None where they are alike."""
    for kind in kinds:
        sizes = {group.units for group in groups.of(kind)}
        if len(sizes) > 1:
            return f"the layers of this model differ already ({min(sizes)} to {max(sizes)} units of {kind})"
    return None


def missed_by_shape(plan: PrunePlan, groups: Groups, config: PreTrainedConfig) -> tuple[str, ...]:
    """Returns a line on a ratio that layers of equal widths, or whole layers, do not meet."""
    if plan.shape != "uniform" or abs(plan.achieved - plan.ratio) <= MOST_MISSED:
        return ()
    counted = plan.made_with.get("settings", {}).get("budget", "parameters")
    if counted != "parameters":
        return ()
    cut = {entry.group for entry in plan.cuts}
    if {group.kind for group in groups.groups if group.name in cut} == {"layer"}:
        return (f"whole layers come no closer to {plan.ratio:.2%} than {plan.achieved:.2%}",)
    missed = f"layers of equal widths come no closer to {plan.ratio:.2%} than {plan.achieved:.2%}"
    return (missed if _why_alike(groups, config) else f"{missed}; `shape=per-layer` may",)


def _check_bridge(settings: PruneSettings) -> None:
    """Refuses a bridge where there is no gap, or where the stream or the memory rules it out.

    Raises:
        InputError: The settings contradict each other.
    """
    if not settings.bridge:
        return
    if "layers" not in settings.targets:
        raise InputError("`bridge` is for gaps that removed layers leave; add layers to `targets`, or leave `bridge` out")
    if "residual" in settings.targets:
        raise InputError("`bridge` compares streams of one width, which `targets=residual` changes; leave one of the two out")
    if settings.memory is not None:
        raise InputError("`bridge` runs the dense and the pruned model beside each other, which `memory` leaves no room for; leave one out")


def _with_effort(settings: PruneSettings, strategy: Strategy, view: ModelView | None) -> PruneSettings:
    """Returns settings with the criterion decided, and with the number of windows that the effort takes where none was given.

    Raises:
        InputError: The effort rules out a re-fit that was asked for.
    """
    effort = EFFORTS[settings.effort]
    if settings.reconstruct == "divergence" and not effort.predictions:
        raise InputError(
            f"`effort={settings.effort}` takes no steps for `reconstruct=divergence`; use `effort=default`, or `reconstruct=least_squares`"
        )
    found: dict[str, Any] = {}
    if settings.criterion == "auto":
        small = view is None or refitting_bytes(view) <= MOST_REFITTING_BYTES
        found["criterion"] = "surgeon_nats" if strategy is IN_MEMORY and small else "surgeon"
    if "samples" not in settings.model_fields_set:
        found["samples"] = effort.samples
    return settings.model_copy(update=found)


def _select(settings: PruneSettings, strategy: Strategy, with_text: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the selector and remarks on it for the user."""
    by_curves = settings.budget != "parameters"
    if settings.select != "auto":
        selector = SELECTORS.get(settings.select)
        if by_curves and (selector.learned or not selector.needs_curves):
            raise InputError(f"`budget={settings.budget}` is only known to the knapsack; use `select=knapsack` (now {settings.select})")
        return settings.select, ()
    if by_curves:
        return "knapsack", ()
    # Without text one share for all; one threshold for all layers lost more by every criterion.
    chosen = strategy.select if with_text else "uniform"
    if chosen == IN_MEMORY.select or not with_text:
        return chosen, ()
    return chosen, ("selection: uniform; the knapsack measures the whole model many times over, which `memory` leaves no room for",)


def _reconstruct(settings: PruneSettings, strategy: Strategy, with_text: bool, view: ModelView | None) -> tuple[str, tuple[str, ...]]:
    """Returns the re-fit and remarks on it for the user."""
    if settings.reconstruct != "auto":
        return settings.reconstruct, ()
    if not with_text:
        return "none", ()
    if not EFFORTS[settings.effort].predictions:
        return "least_squares", ()
    needed = refitting_bytes(view) if view is not None and strategy.reconstruct == "divergence" else 0
    if needed <= MOST_REFITTING_BYTES:
        return strategy.reconstruct, ()
    return "least_squares", (
        f"reconstruct: least_squares; to re-fit a model of this size to its predictions as well takes {needed / 1e9:.0f} GB more "
        "(`reconstruct=divergence`)",
    )


def goes_whole(settings: PruneSettings) -> bool:
    """Returns whether layers, attention or feed-forward parts may be removed as units."""
    return bool(set(kinds_wanted(settings)) & set(WHOLE))


def kinds_wanted(settings: PruneSettings, plan: PrunePlan | None = None) -> tuple[GroupKind, ...]:
    """Returns the kinds of groups that the settings cut and, with a plan, those that the plan cuts."""
    kinds: list[GroupKind] = [KIND_OF[target] for target in settings.targets]
    if plan is not None:
        kinds.extend(kind for kind in KIND_OF.values() if any(f".{entry.group}".endswith(f".{kind}") for entry in plan.cuts))
    return tuple(dict.fromkeys(kinds))


def layers_in(text: str, count: int) -> tuple[int, ...]:
    """Returns the layer indices of a range written as a Python slice.

    Raises:
        InputError: The range is empty.

    >>> layers_in("1:-1", 4)
    (1, 2)
    """
    parts = [int(part) if part.strip() else None for part in text.split(":")]
    chosen = tuple(range(count)[slice(*parts)])
    if not chosen:
        raise InputError(f"`layers={text}` names no layer of this model's {count}; write START:STOP, such as 1:-1")
    return tuple(sorted(chosen))


def left_out(settings: PruneSettings, found: Traced) -> tuple[str, ...]:
    """Returns a line for each target that a model does not have or that cannot be cut in it."""
    lines: list[str] = []
    for target in settings.targets:
        if not found.groups.of(KIND_OF[target]):
            reasons = dict.fromkeys(refusal.reason for refusal in found.refusals if refusal.kind == KIND_OF[target])
            lines.append(f"`targets={target}` is left out: {'; '.join(reasons) or 'this model has none'}")
    return tuple(lines)


def budget_of(groups: Groups, settings: PruneSettings) -> Budget:
    """Returns the budget of a model: the share to remove, and the layers and kinds to remove it from.

    Raises:
        InputError: The range of layers is empty; or it excludes layers, although ``shape=uniform`` or the residual width concerns every
            layer; or attention or feed-forward parts are to be removed with ``shape=uniform``, or the layers differ already.
    """
    differ = layers_differ(groups, kinds_wanted(settings))
    if differ and settings.shape == "uniform":
        raise InputError(f"`shape=uniform` needs layers of equal size, but {differ}; use `shape=per-layer`")
    parts = [target for target in settings.targets if target in ("attention", "mlp")]
    if parts and settings.shape == "uniform":
        raise InputError(
            f"`targets={parts[0]}` leaves layers that differ, which `shape=uniform` rules out; use `shape=per-layer`, or layers"
        )
    budget = Budget(
        ratio=settings.ratio,
        shape=settings.shape,
        layers=layers_in(settings.layers, groups.layers),
        targets=kinds_wanted(settings),
        align=settings.align if isinstance(settings.align, int) else 1,
    )
    if settings.shape == "uniform" and len(budget.layers) < groups.layers:
        raise InputError(
            f"`shape=uniform` wants the same width in all {groups.layers} layers, but `layers={settings.layers}` prunes only "
            f"{len(budget.layers)}; drop `layers` or use `shape=per-layer`"
        )
    if "residual" in settings.targets and len(budget.layers) < groups.layers:
        raise InputError(
            f"the residual width runs through all {groups.layers} layers, but `layers={settings.layers}` prunes only "
            f"{len(budget.layers)}; drop `layers`, or residual from `targets`"
        )
    return budget
