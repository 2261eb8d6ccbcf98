"""What "auto" means, decided once: settings become a :class:`ResolvedPrune`, in which nothing is left to decide but the alignment.

Two strategies say what is best and what is possible: :data:`IN_MEMORY`, where the whole model can be run as often as one likes, and
:data:`STREAMED`, where a bound of memory lets one layer in at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from regraft.errors import InputError
from regraft.groups.traced import Traced
from regraft.importance import CRITERIA
from regraft.models.view import ModelView
from regraft.plans import WHOLE, GroupKind, Groups, PrunePlan
from regraft.selection import SELECTORS, Budget
from regraft.selection.budget import AUTO_ALIGNMENTS
from regraft.settings import PruneSettings, Target
from regraft.surgery.refit_predictions import refitting_bytes

Reconstruct = Literal["divergence", "least_squares", "mean", "none"]
# Re-fitting to the dense model's predictions is the default up to here, which is about half a billion parameters.
MOST_REFITTING_BYTES = 8_000_000_000
# Where the word of the settings is not that of the groups.
KIND_OF: dict[Target, GroupKind] = {
    "heads": "heads",
    "ffn": "ffn",
    "query_heads": "query_heads",
    "residual": "residual",
    "layers": "layer",
    "attention": "attention",
    "mlp": "mlp",
}


@dataclass(frozen=True)
class ResolvedPrune:
    """How a model is pruned, with every "auto" decided.

    Attributes:
        settings: With the decided values in the place of "auto"; ``align`` alone may still say it, for ``alignments`` to be tried.
        seed: Of the calibration windows and of random scores.
        alignments: Of widths, tried in this order until one meets the target.
        needs_text: Whether planning needs calibration text.
        notes: What the user should know of what was decided, a line each.
    """

    settings: PruneSettings
    seed: int
    alignments: tuple[int, ...]
    needs_text: bool
    notes: tuple[str, ...] = ()

    @property
    def refit(self) -> Reconstruct | None:
        """How projections that read pruned channels are re-fitted; None for not at all."""
        method = self.settings.reconstruct
        assert method != "auto"
        return None if method == "none" else method

    @property
    def kinds(self) -> tuple[GroupKind, ...]:
        """The kinds of groups that are cut."""
        return kinds_wanted(self.settings)

    def record(self, plan: PrunePlan | None = None) -> dict[str, Any]:
        """Returns, as plain JSON types, the settings that decide which model comes out; with a plan, the alignment that it reached."""
        values = self.settings.decisive()
        return values if plan is None else values | {"align": plan.align}


@dataclass(frozen=True)
class Strategy:
    """What is best where a model is held in one way, and what cannot be done there.

    Attributes:
        select: The best selector for criteria that read text.
        reconstruct: The best re-fit.
        depth: The best criterion for layers and parts of layers that go whole.
        refuse: Raises an InputError where resolved settings cannot be carried out in this way.
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


IN_MEMORY = Strategy("knapsack", "divergence", "removal", lambda settings: None)
STREAMED = Strategy("uniform", "least_squares", "block_influence", _refuse_when_streamed)


def resolve(settings: PruneSettings, view: ModelView | None = None, seed: int = 0) -> ResolvedPrune:
    """Decides what "auto" means: criteria without text stay without text, everything else takes the best that the strategy has.

    Args:
        settings: What was asked for.
        view: The model. Without it, names and contradictions are checked, and a model of moderate size is assumed.
        seed: Of the calibration windows and of random scores.

    Raises:
        InputError: The criterion is unknown, the budget needs a selector that was not chosen, or the strategy rules something out.
    """
    if not settings.targets:
        raise InputError(f"`targets` names nothing to prune; name one or more of {', '.join(KIND_OF)}")
    strategy = IN_MEMORY if settings.memory is None else STREAMED
    with_text = CRITERIA.get(settings.criterion).needs_text
    select, notes = _select(settings, strategy, with_text)
    reconstruct, more = _reconstruct(settings, strategy, with_text, view)
    depth = (strategy.depth if goes_whole(settings) else IN_MEMORY.depth) if settings.depth == "auto" else settings.depth
    decided = settings.model_copy(update={"select": select, "reconstruct": reconstruct, "depth": depth})
    strategy.refuse(decided)
    return ResolvedPrune(
        settings=decided,
        seed=seed,
        alignments=AUTO_ALIGNMENTS if settings.align == "auto" else (settings.align,),
        needs_text=with_text or select == "knapsack" or reconstruct != "none" or goes_whole(settings),
        notes=notes + more,
    )


def resolve_replay(settings: PruneSettings, view: ModelView | None, seed: int) -> ResolvedPrune:
    """Decides what is left to decide where a plan is given: how projections are re-fitted. How it was chosen no longer matters.

    Raises:
        InputError: The re-fit takes the whole model, and there is a bound of memory.
    """
    strategy = IN_MEMORY if settings.memory is None else STREAMED
    way = resolve(settings.model_copy(update={"memory": None, "reconstruct": "none"}), view, seed)
    reconstruct, _ = _reconstruct(settings, strategy, CRITERIA.get(settings.criterion).needs_text, view)
    if reconstruct == "divergence":
        strategy.refuse(settings.model_copy(update={"select": "uniform", "rounds": 1, "reconstruct": reconstruct}))
    decided = way.settings.model_copy(update={"memory": settings.memory, "reconstruct": reconstruct})
    return ResolvedPrune(decided, seed, way.alignments, needs_text=reconstruct != "none")


def _select(settings: PruneSettings, strategy: Strategy, with_text: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the selector and what is to be said of it."""
    by_curves = settings.budget != "parameters"
    if settings.select != "auto":
        if by_curves and settings.select != "knapsack":
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
    """Returns the re-fit and what is to be said of it."""
    if settings.reconstruct != "auto":
        return settings.reconstruct, ()
    if not with_text:
        return "none", ()
    needed = refitting_bytes(view) if view is not None and strategy.reconstruct == "divergence" else 0
    if needed <= MOST_REFITTING_BYTES:
        return strategy.reconstruct, ()
    return "least_squares", (
        f"reconstruct: least_squares; to re-fit a model of this size to its predictions as well takes {needed / 1e9:.0f} GB more "
        "(`reconstruct=divergence`)",
    )


def goes_whole(settings: PruneSettings) -> bool:
    """Returns whether layers or parts of layers may go whole."""
    return bool(set(kinds_wanted(settings)) & set(WHOLE))


def kinds_wanted(settings: PruneSettings, plan: PrunePlan | None = None) -> tuple[GroupKind, ...]:
    """Returns the kinds of groups that the settings cut, and those that a plan cuts that is to be replayed."""
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
    """Returns a line for each target that a model has not got, or that cannot be cut in it."""
    lines: list[str] = []
    for target in settings.targets:
        if not found.groups.of(KIND_OF[target]):
            reasons = dict.fromkeys(refusal.reason for refusal in found.refusals if refusal.kind == KIND_OF[target])
            lines.append(f"`targets={target}` is left out: {'; '.join(reasons) or 'this model has none'}")
    return tuple(lines)


def budget_of(groups: Groups, settings: PruneSettings) -> Budget:
    """Returns how much the settings remove from a model, and from where.

    Raises:
        InputError: The range of layers is empty, or spares layers of a model that is to stay uniform or to become narrower, or a part of
            some layers is to go from a model whose layers are to stay alike.
    """
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
