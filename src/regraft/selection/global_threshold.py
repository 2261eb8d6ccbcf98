"""One threshold for the whole model: the units that matter least for each parameter that they cost go first.

Units leave in blocks that keep the widths aligned. A block that would overshoot the target is passed over for a smaller one, so
that the target is met within one aligned step of one layer.

Layers that go whole, and parts of them, are ranked by other scores than units are: they lose the share that everything would lose
evenly, and the threshold chooses among the units of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import InputError
from regraft.groups.ledger import Ledger
from regraft.plans import WHOLE, Group, Groups, Scores
from regraft.selection.budget import SELECTORS, Budget, Kept, Selector
from regraft.selection.uniform import even_share, uniform, whole_cuts


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
    wide = [group for group in prunable if group.kind not in WHOLE]
    if not wide:
        return uniform(groups, scores, budget)
    ledger = Ledger(groups, [group.name for group in prunable])
    target = budget.ratio * groups.parameters
    gone = whole_cuts(groups, prunable, scores, even_share(ledger, prunable, groups.parameters - target))
    blocks = [block for group in wide for block in _blocks(group, scores.values[group.name], budget)]
    kept = {group.name: group.units for group in wide} | gone
    missing = target - (groups.parameters - ledger.left(gone))
    closed: set[str] = set()
    smallest = min((block.parameters for block in blocks), default=0)
    for block in sorted(blocks, key=lambda block: block.score_per_parameter):
        # A large block (a head) that overshoots leaves the rest of the way to the small ones.
        cost = 0.0 if block.group in closed else ledger.lost(block.group, kept, kept[block.group] - block.units)
        if not cost or cost - missing > 0.5 * smallest:
            closed.add(block.group)
            continue
        kept[block.group] -= block.units
        missing -= cost
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
