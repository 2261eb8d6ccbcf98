"""One threshold for the whole model: the units that matter least for each parameter that they cost go first.

Units leave in blocks that keep the widths aligned. A block that would overshoot the target is passed over for a smaller one, so
that the target is met within one aligned step of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import InputError
from regraft.plans import Group, Groups, Scores
from regraft.selection.budget import SELECTORS, Budget, Kept, Selector


@dataclass(frozen=True)
class _Block:
    """Units that leave together: one aligned step of one group."""

    group: str
    units: int
    parameters: int
    score_per_parameter: float


def global_threshold(groups: Groups, scores: Scores, budget: Budget) -> Kept:
    """Returns how many units stay when the cheapest blocks of all layers leave first.

    Raises:
        InputError: The budget asks for a uniform shape, which one threshold cannot give.
    """
    if budget.shape == "uniform":
        raise InputError("selection 'global' gives every layer its own width; use --shape per-layer, or selection 'uniform'")
    prunable = budget.prunable(groups)
    blocks = [block for group in prunable for block in _blocks(group, scores.values[group.name], budget)]
    kept = {group.name: group.units for group in prunable}
    missing = budget.ratio * groups.parameters
    closed: set[str] = set()
    smallest = min((block.parameters for block in blocks), default=0)
    for block in sorted(blocks, key=lambda block: block.score_per_parameter):
        # A large block (a head) that overshoots leaves the rest of the way to the small ones.
        if block.group in closed or block.parameters - missing > 0.5 * smallest:
            closed.add(block.group)
            continue
        kept[block.group] -= block.units
        missing -= block.parameters
    return kept


def _blocks(group: Group, values: tuple[float, ...], budget: Budget) -> list[_Block]:
    """Returns the blocks of a group in the order in which they must leave; the last aligned step stays."""
    ascending = sorted(values)
    step, floor = budget.step(group), budget.floor(group)
    blocks: list[_Block] = []
    left = group.units
    while left > floor:
        count = left - (left - 1) // step * step if left == group.units else step
        units = ascending[group.units - left : group.units - left + count]
        mean = sum(units) / count
        blocks.append(_Block(group.name, count, count * group.unit_parameters, mean / group.unit_parameters))
        left -= count
    return blocks


SELECTORS.add("global", Selector("global", needs_curves=False, choose=global_threshold))
