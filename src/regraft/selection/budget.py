"""The contract of a selector: from groups, scores and a budget of parameters to the units to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from regraft.errors import InputError, PlanError
from regraft.groups.parameter_count import Ledger
from regraft.plans import WHOLE, Curves, Cut, Group, GroupKind, Groups, PrunePlan, Scores, Shape
from regraft.registry import NamedRegistry

# Alignments for ``auto``, tried from the left: the first, and so the widest, that meets the target closely enough is taken.
# 256 is the block of K quantization and the widest tile of matrix kernels, 64 the usual tile, 32 the block of other quantizations.
# They are worth more than the last tenths of the ratio: see closest_wanted.
WIDE_ALIGNMENTS = (256, 64, 32)
NARROW_ALIGNMENTS = (16, 8, 4, 2, 1)
_CLOSE_ENOUGH = 0.0025
# The share of all parameters, and the share of the ratio, that a wide alignment may cost at most.
MOST_MISSED = 0.01
_MOST_OF_RATIO = 0.05
TOKEN_STEPS = 256  # in which the tokens that may go are counted
# A width has at least this many steps of a wide alignment, so that layers and kinds can still differ by what they are worth.
_FEWEST_STEPS = 8


@dataclass(frozen=True)
class Budget:
    """The amount to remove, and the groups to remove it from.

    Attributes:
        ratio: Share of all parameters of the model to remove.
        shape: ``uniform`` for the same widths in every layer.
        layers: Indices of the layers that may be cut, ascending; the residual width belongs to all layers.
        targets: Kinds of groups that may be cut.
        align: Number of which the cut widths of feed-forward networks and of the residual stream become multiples. Heads are always
            complete and need no alignment.
        curves: Measured damage against size, for the selectors that need it. The ratio is a share of the total in their unit.
    """

    ratio: float
    shape: Shape
    layers: tuple[int, ...]
    targets: tuple[GroupKind, ...]
    align: int
    curves: Curves | None = None

    @property
    def counted(self) -> bool:
        """Returns whether the ratio is a share of what can be counted: parameters or bytes, not time."""
        return self.curves is None or self.curves.unit != "milliseconds"

    def prunable(self, groups: Groups) -> tuple[Group, ...]:
        """Returns the groups that may be cut."""
        return tuple(group for group in groups.groups if group.kind in self.targets and (group.layer is None or group.layer in self.layers))

    def step(self, group: Group) -> int:
        """Returns the alignment of a group's number of units."""
        if group.kind == "vocabulary":
            return max(1, group.units // TOKEN_STEPS)
        return self.align if group.kind in ("ffn", "residual") else 1

    def floor(self, group: Group) -> int:
        """Returns the fewest units that a group may keep: one aligned step (at most all units), or 0 for a layer or part."""
        return 0 if group.kind in WHOLE else min(self.step(group), group.units)

    def floors(self, groups: Groups) -> dict[str, int]:
        """Returns the fewest units that every group may keep; at least one layer of the model is kept."""
        found = {group.name: self.floor(group) for group in self.prunable(groups)}
        layers = [name for name in found if groups.named()[name].kind == "layer"]
        return found | ({layers[0]: 1} if len(layers) == groups.layers else {})


Kept = Mapping[str, int]
"""Group name to the number of kept units."""


@dataclass(frozen=True)
class Selector:
    """A named method of choosing widths.

    Attributes:
        name: Name on the command line.
        needs_curves: Whether ``Budget.curves`` must be given.
        choose: Function from groups, scores and budget to the numbers of kept units.
        compares_layers: Whether it weighs scores of one layer against those of another, for which they have to be in one unit.
        learned: Whether its scores are gates, learned on calibration text from the knapsack's answer on.
    """

    name: str
    needs_curves: bool
    choose: Callable[[Groups, Scores, Budget], Kept]
    compares_layers: bool = False
    learned: bool = False


SELECTORS: NamedRegistry[Selector] = NamedRegistry("selector", group="regraft.selectors", of=Selector)


def select(name: str, groups: Groups, scores: Scores, budget: Budget, *, auto_align: bool = False) -> PrunePlan:
    """Chooses the units to keep: the selector decides how many, the scores decide which.

    Args:
        name: Name of a registered selector.
        groups: Groups of the model.
        scores: Scores of the same model.
        budget: The amount to remove.
        auto_align: Replace ``budget.align`` by the widest of :func:`alignments_for` that meets the target.

    Raises:
        InputError: The budget cannot be met; the message gives the limit.
        PlanError: The scores belong to another model.
    """
    if scores.fingerprint != groups.fingerprint:
        raise PlanError(f"the scores are of model {scores.fingerprint}, not of {groups.fingerprint}; score this model again")
    selector = SELECTORS.get(name)
    alignments = alignments_for(groups, budget) if auto_align else (budget.align,)
    plans: list[PrunePlan] = []
    refused: InputError | None = None
    for align in alignments:
        aligned = replace(budget, align=align)
        try:
            check_possible(groups, aligned)
            plans.append(_plan(name, groups, scores, aligned, selector.choose(groups, scores, aligned)))
        except InputError as error:  # a narrower alignment may still be possible
            refused = error
            continue
        if not budget.counted or abs(plans[-1].achieved - budget.ratio) <= closest_wanted(align, budget.ratio):
            return plans[-1]
    if not plans:
        assert refused is not None
        raise refused
    return min(plans, key=lambda plan: abs(plan.achieved - budget.ratio))


def alignments_for(groups: Groups, budget: Budget) -> tuple[int, ...]:
    """Returns the alignments that ``auto`` tries, the widest first.

    A wide one is tried where every width that may be cut has at least eight steps of it, and where parameters are counted.
    """
    widths = [group.units for group in budget.prunable(groups) if replace(budget, align=2).step(group) == 2]
    most = min(widths, default=0) if budget.counted else 0
    return (*(align for align in WIDE_ALIGNMENTS if _FEWEST_STEPS * align <= most), *NARROW_ALIGNMENTS)


def closest_wanted(align: int, ratio: float) -> float:
    """Returns by which share of all parameters an alignment may miss the target for ``auto`` to take it.

    >>> closest_wanted(64, 0.2), closest_wanted(64, 0.16), closest_wanted(16, 0.2)
    (0.01, 0.008, 0.0025)
    """
    return min(MOST_MISSED, max(_MOST_OF_RATIO * ratio, _CLOSE_ENOUGH)) if align in WIDE_ALIGNMENTS else _CLOSE_ENOUGH


def check_possible(groups: Groups, budget: Budget) -> None:
    """Refuses a ratio that would leave a layer empty.

    Raises:
        InputError: The ratio is too large; the message gives the largest possible one.
    """
    prunable = budget.prunable(groups)
    if not prunable:
        raise InputError(f"nothing to prune: no {' or '.join(budget.targets)} in layers {list(budget.layers)}; widen `layers`")
    ledger = Ledger(groups, [group.name for group in prunable])
    most = groups.parameters - ledger.left(budget.floors(groups))
    wanted = budget.ratio * groups.parameters
    if budget.counted and wanted > most:
        stays = ledger.left({group.name: 0.0 for group in prunable}) / groups.parameters
        raise InputError(
            f"ratio {budget.ratio:g} would leave a layer empty: at most {most / groups.parameters:.3f} of the "
            f"{groups.parameters:,} parameters can go (one unit of {budget.align} stays in every layer, "
            f"and {stays:.3f} are embeddings, mixers and others that `targets` leaves alone); "
            "lower `ratio` or widen `layers`"
        )


def _plan(name: str, groups: Groups, scores: Scores, budget: Budget, kept: Kept) -> PrunePlan:
    kept = _without_nested(groups, kept)
    cuts = tuple(
        Cut(group.name, best_units(scores.values[group.name], kept[group.name]))
        for group in groups.groups
        if kept.get(group.name, group.units) < group.units
    )
    left = Ledger(groups, [cut.group for cut in cuts]).left({cut.group: len(cut.kept) for cut in cuts})
    if not cuts:
        raise InputError(_too_little(budget))
    return PrunePlan(
        fingerprint=groups.fingerprint,
        criterion=scores.criterion,
        selection=name,
        shape=budget.shape,
        ratio=budget.ratio,
        align=budget.align,
        parameters_before=groups.parameters,
        parameters_after=round(left),
        cuts=cuts,
    )


def _too_little(budget: Budget) -> str:
    unit = "one unit of every layer" if budget.shape == "uniform" else "one unit"
    ways = ["raise `ratio`"]
    ways += ["use `shape=per-layer`"] if budget.shape == "uniform" else []
    ways += [f"lower `align` (now {budget.align})"] if budget.align > 1 else []
    return f"ratio {budget.ratio:g} removes less than {unit}; {', or '.join(ways)}"


def _without_nested(groups: Groups, kept: Kept) -> dict[str, int]:
    """Drops the decisions for groups inside a removed layer or a removed part."""
    named = groups.named()
    gone = {(named[name].kind, named[name].layer) for name, count in kept.items() if not count}

    def lasts(group: Group) -> bool:
        within = {"heads": "attention", "query_heads": "attention", "ffn": "mlp"}.get(group.kind)
        return (group.kind == "layer" or ("layer", group.layer) not in gone) and (within, group.layer) not in gone

    return {name: count for name, count in kept.items() if lasts(named[name])}


def best_units(scores: tuple[float, ...], count: int) -> tuple[int, ...]:
    """Returns the ``count`` units with the highest scores, ascending; among equal scores the earlier units are kept.

    >>> best_units((0.1, 3.0, 2.0, 3.0), 2)
    (1, 3)
    """
    ranked = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    return tuple(sorted(ranked[:count]))
