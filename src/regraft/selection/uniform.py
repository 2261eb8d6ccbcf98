"""The same share of every group: LLM-Pruner's block-wise mode, met exactly instead of "ratio 0.25 removes 20 %".

Heads come in large units, so they are cut down to the nearest count that does not exceed the share, and the feed-forward width,
whose units are small, closes the gap to the target. Where it cannot, another head goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regraft.plans import Group, Groups, Scores
from regraft.selection.budget import SELECTORS, Budget, Kept, Selector


def uniform(groups: Groups, scores: Scores, budget: Budget) -> Kept:
    """Returns how many units stay under one share for all groups of a kind.

    The total is met within half an aligned step of all feed-forward networks in the range. The scores play no part here.
    """
    prunable = budget.prunable(groups)
    target = budget.ratio * groups.parameters
    share = target / sum(group.units * group.unit_parameters for group in prunable)
    fine = [group for group in prunable if group.kind == "ffn"]
    coarse = [group for group in prunable if group.kind != "ffn"]
    if not fine:
        return _closest(coarse, target, budget)
    candidates: list[dict[str, int]] = []
    heads = {group.name: max(1, group.units - int(share * group.units)) for group in coarse}
    while True:
        rest = target - _removed(coarse, heads)
        candidates.append(heads | _closest(fine, max(rest, 0.0), budget))
        if rest <= _most(fine, budget) or all(count == 1 for count in heads.values()):
            return min(candidates, key=lambda kept: abs(_removed(prunable, kept) - target))
        heads = {name: max(1, count - 1) for name, count in heads.items()}


def _closest(groups: Sequence[Group], target: float, budget: Budget) -> dict[str, int]:
    """Returns counts under one share, in aligned steps, that remove the number of parameters nearest to ``target``."""

    def at(share: float) -> dict[str, int]:
        return {group.name: _aligned(group, group.units * (1.0 - share), budget) for group in groups}

    low, high = _bisect(lambda share: _removed(groups, at(share)) <= target)
    return min(at(low), at(high), key=lambda kept: abs(_removed(groups, kept) - target))


def _aligned(group: Group, count: float, budget: Budget) -> int:
    """Rounds a count to the alignment, between one step and the whole group; the whole group need not be aligned."""
    step = budget.step(group)
    if count >= group.units - 0.5 * (group.units - (group.units - 1) // step * step):
        return group.units
    return max(budget.floor(group), round(count / step) * step)


def _bisect(below: Callable[[float], bool]) -> tuple[float, float]:
    """Returns the two shares between which ``below`` turns false."""
    low, high = 0.0, 1.0
    if below(high):
        return high, high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


def _removed(groups: Sequence[Group], kept: Kept) -> int:
    return sum((group.units - kept[group.name]) * group.unit_parameters for group in groups)


def _most(groups: Sequence[Group], budget: Budget) -> int:
    return sum((group.units - budget.floor(group)) * group.unit_parameters for group in groups)


SELECTORS.add("uniform", Selector("uniform", needs_curves=False, choose=uniform))
