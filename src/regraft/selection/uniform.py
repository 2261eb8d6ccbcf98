"""The same share of every kind of group: LLM-Pruner's block-wise mode, but with the ratio met exactly.

Heads, whole layers and aligned widths of the stream have large units. They lose the largest count that does not exceed the share. The
kind with the smallest units (the feed-forward width, if it is a target) then closes the gap to the target. If it cannot, the other kinds
lose one more unit: in all layers at once for the shape ``uniform``, otherwise in one layer after another until the gap can be closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from regraft.errors import InputError
from regraft.groups.parameter_count import Ledger
from regraft.plans import WHOLE, Group, GroupKind, Groups, Scores
from regraft.selection.budget import SELECTORS, Budget, Kept, Selector

# Kinds from the smallest units to the largest; the first kind that is a target closes the gap.
FINEST_FIRST: tuple[GroupKind, ...] = ("ffn", "residual", "vocabulary", "query_heads", "heads", "mixer_heads", "mlp", "attention", "layer")


def uniform(groups: Groups, scores: Scores, budget: Budget) -> Kept:
    """Returns how many units each group keeps, with one share for all groups of a kind.

    The target is met within half an aligned step of all groups of the closing kind. Scores decide which layers and which parts of layers
    are removed.
    """
    prunable = budget.prunable(groups)
    ledger = Ledger(groups, [group.name for group in prunable])
    target = budget.ratio * groups.parameters
    share = even_share(ledger, prunable, groups.parameters - target)
    closing = next(kind for kind in FINEST_FIRST if any(group.kind == kind for group in prunable))
    fine = [group for group in prunable if group.kind == closing]
    coarse = [group for group in prunable if group.kind != closing]

    floors = {group.name: budget.floor(group) for group in fine}

    def excess(kept: Kept) -> float:
        """Returns how many parameters a choice removes beyond the target."""
        return groups.parameters - ledger.left(kept) - target

    candidates: list[dict[str, int]] = []
    for rest in _ever_fewer(groups, coarse, scores, share, budget):
        candidates.append(rest | _closed(groups, fine, rest, scores, budget, excess))
        if excess(rest | floors) >= 0:  # from here on the closing kind reaches the target, so that no other need lose more
            break
    return min(candidates, key=lambda kept: abs(excess(kept)))


def _ever_fewer(groups: Groups, coarse: Sequence[Group], scores: Scores, share: float, budget: Budget) -> Iterator[dict[str, int]]:
    """Yields choices for the kinds that do not close the gap, each with fewer units than the one before.

    The first takes the share from every kind, rounded down. The others lead from there to one unit less of every kind, to two less, and
    so on, until no kind can lose more.
    """
    most = max((group.units for group in coarse), default=0) + len(coarse)
    before = _shared(groups, coarse, scores, share, 0, budget)
    yield before
    for extra in range(1, 1 + most):
        after = _shared(groups, coarse, scores, share, extra, budget)
        if after == before:
            return
        yield from _one_after_another(before, after, coarse, scores, budget)
        before = after


def _shared(groups: Groups, coarse: Sequence[Group], scores: Scores, share: float, extra: int, budget: Budget) -> dict[str, int]:
    """Returns the counts after every kind has lost its share, rounded down, and ``extra`` units more."""
    widths = {group.name: _reduced(group, share, extra, budget) for group in coarse if group.kind not in WHOLE}
    return whole_cuts(groups, coarse, scores, share, extra) | widths


def _one_after_another(
    before: dict[str, int], after: dict[str, int], coarse: Sequence[Group], scores: Scores, budget: Budget
) -> Iterator[dict[str, int]]:
    """Yields the steps from one choice to the next: kind by kind for the shape ``uniform``, else group by group, lowest score first."""
    changed = [group for group in coarse if before.get(group.name, group.units) != after.get(group.name, group.units)]
    changed.sort(key=lambda group: (FINEST_FIRST.index(group.kind), _next_score(group, before, scores)))
    steps = list(alike(changed)) if budget.shape == "uniform" else [(group,) for group in changed]
    kept = dict(before)
    for step in steps:
        kept = kept | {group.name: after[group.name] for group in step if group.name in after}
        yield dict(kept)


def _next_score(group: Group, kept: Kept, scores: Scores) -> float:
    """Returns the score of the unit of a group that would be removed next."""
    units = kept.get(group.name, group.units)
    return sorted(scores.values[group.name])[min(group.units - units, group.units - 1)]


def even_share(ledger: Ledger, prunable: Sequence[Group], wanted: float) -> float:
    """Returns the share to remove from every kind so that ``wanted`` parameters are left, counting fractions of units."""
    low, high = _bisect(lambda share: ledger.left({group.name: group.units * (1.0 - share) for group in prunable}) >= wanted)
    return 0.5 * (low + high)


def whole_cuts(groups: Groups, prunable: Sequence[Group], scores: Scores, share: float, extra: int = 0) -> dict[str, int]:
    """Returns the layers and parts of layers to remove: of each kind the share with the lowest scores, rounded down.

    Args:
        groups: Groups of the model; one layer is always kept.
        prunable: Groups of any kinds that may be cut.
        scores: Scores of these groups.
        share: Share to remove of each kind.
        extra: Number to remove of each kind beyond the share.

    Returns:
        Name of each removed group to zero.
    """
    found: dict[str, int] = {}
    gone: set[int | None] = set()
    for kind in WHOLE:
        here = [group for group in prunable if group.kind == kind and group.layer not in gone]
        most = min(len(here), groups.layers - 1) if kind == "layer" else len(here)
        count = min(most, int(share * len(here) + 1e-9) + extra) if here else 0
        lowest = sorted(here, key=lambda group: (scores.values[group.name][0], group.layer))[:count]
        found |= {group.name: 0 for group in lowest}
        gone |= {group.layer for group in lowest} if kind == "layer" else set()
    return found


def alike(groups: Sequence[Group]) -> list[tuple[Group, ...]]:
    """Returns the groups of each kind as one tuple, for the shape ``uniform``.

    Raises:
        InputError: The groups of a kind differ in size.
    """
    kinds: dict[GroupKind, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    for kind, members in kinds.items():
        if len({group.units for group in members}) > 1:
            raise InputError(f"`shape=uniform` needs layers of equal size, but the {kind} of this model differ; use `shape=per-layer`")
    return [tuple(members) for members in kinds.values()]


def _reduced(group: Group, share: float, extra: int, budget: Budget) -> int:
    step = budget.step(group)
    if step == 1:
        return max(1, group.units - int(share * group.units + 1e-9) - extra)
    return max(budget.floor(group), _aligned(group, group.units * (1.0 - share), budget) - extra * step)


def _closed(
    groups: Groups, fine: Sequence[Group], kept: Kept, scores: Scores, budget: Budget, excess: Callable[[Kept], float]
) -> dict[str, int]:
    """Returns the counts for the groups of one kind that come nearest to the target, given the counts of the other kinds."""
    if fine[0].kind in WHOLE:
        options = [whole_cuts(groups, fine, scores, 0.0, count) for count in range(len(fine) + 1)]
        return min(options, key=lambda option: abs(excess({**kept, **option})))

    def at(share: float) -> dict[str, int]:
        return {group.name: _aligned(group, group.units * (1.0 - share), budget) for group in fine}

    low, high = _bisect(lambda share: excess({**kept, **at(share)}) <= 0)
    return min(at(low), at(high), key=lambda option: abs(excess({**kept, **option})))


def _aligned(group: Group, count: float, budget: Budget) -> int:
    """Rounds a count to the alignment, between one step and the full group; the full size need not be aligned."""
    step = budget.step(group)
    if count >= group.units - 0.5 * (group.units - (group.units - 1) // step * step):
        return group.units
    return max(budget.floor(group), round(count / step) * step)


def _bisect(below: Callable[[float], bool]) -> tuple[float, float]:
    """Returns two shares, very close together, between which ``below`` becomes false."""
    low, high = 0.0, 1.0
    if below(high):
        return high, high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


SELECTORS.include(Selector("uniform", needs_curves=False, choose=uniform))
