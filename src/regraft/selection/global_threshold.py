"""One threshold for the model: units with the lowest score per parameter are removed first.

Units are removed in blocks that keep the widths aligned. A block that would overshoot the target is skipped for a smaller one, so that
the target is met within one aligned step of one layer.

Scores of layers and parts of layers cannot be compared with scores of units. Therefore layers and parts lose the even share of the
target first, and the threshold chooses among the units of the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from regraft.groups.parameter_count import Ledger
from regraft.plans import WHOLE, Group, Groups, Scores
from regraft.selection.budget import SELECTORS, Budget, Kept, Selector
from regraft.selection.uniform import alike, even_share, uniform, whole_cuts


@dataclass(frozen=True)
class _Block:
    """Units that are removed together: one aligned step of one group, or of every group of a kind for the shape ``uniform``."""

    lane: tuple[Group, ...]
    units: int
    parameters: int
    score_per_parameter: float


def global_threshold(groups: Groups, scores: Scores, budget: Budget) -> Kept:
    """Returns how many units each group keeps when the cheapest blocks are removed first.

    For the shape ``uniform`` a block is one step of all layers, and the threshold only weighs kinds of groups against each other.

    Raises:
        InputError: The shape is ``uniform`` but the layers already have different sizes.
    """
    prunable = budget.prunable(groups)
    wide = [group for group in prunable if group.kind not in WHOLE]
    if not wide:
        return uniform(groups, scores, budget)
    ledger = Ledger(groups, [group.name for group in prunable])
    target = budget.ratio * groups.parameters
    gone = whole_cuts(groups, prunable, scores, even_share(ledger, prunable, groups.parameters - target))
    lanes = alike(wide) if budget.shape == "uniform" else [(group,) for group in wide]
    blocks = [block for lane in lanes for block in _blocks(lane, scores, budget)]
    kept = {group.name: group.units for group in wide} | gone
    missing = target - (groups.parameters - ledger.left(gone))
    closed: set[tuple[str, ...]] = set()
    smallest = min((block.parameters for block in blocks), default=0)
    for block in sorted(blocks, key=lambda block: block.score_per_parameter):
        # A large block (a head) that would overshoot is skipped; small blocks close the rest of the gap.
        lane = tuple(group.name for group in block.lane)
        cost = 0.0 if lane in closed else _cost(ledger, kept, lane, block.units)
        if not cost or cost - missing > 0.5 * smallest:
            closed.add(lane)
            continue
        kept |= {name: kept[name] - block.units for name in lane}
        missing -= cost
    return kept


def _cost(ledger: Ledger, kept: Kept, lane: tuple[str, ...], units: int) -> float:
    """Returns how many parameters are lost when every group of a lane loses ``units`` units."""
    if len(lane) == 1:
        return ledger.lost(lane[0], kept, kept[lane[0]] - units)
    total, after = 0.0, dict(kept)
    for name in lane:
        total += ledger.lost(name, after, after[name] - units)
        after[name] -= units
    return total


def _blocks(lane: tuple[Group, ...], scores: Scores, budget: Budget) -> list[_Block]:
    """Returns the blocks of a lane in the order of removal; the last aligned step is always kept."""
    first = lane[0]
    ascending = [sorted(scores.values[group.name]) for group in lane]
    parameters = sum(group.unit_parameters for group in lane)
    step, floor = budget.step(first), budget.floor(first)
    blocks: list[_Block] = []
    left = first.units
    while left > floor:
        count = left - (left - 1) // step * step if left == first.units else step
        start = first.units - left
        total = sum(sum(values[start : start + count]) for values in ascending)
        blocks.append(_Block(lane, count, count * parameters, total / (count * parameters)))
        left -= count
    return blocks


def as_shares(groups: Groups, scores: Scores) -> Scores:
    """Returns scores that compare between layers and kinds: the share of its group's total that each unit carries.

    How large the output of a part is follows the scale of the residual stream in its layer, which norms take out again; what share of the
    output goes does not. FLAP (arXiv 2312.11983, section 4.2) gives each group mean 0 and standard deviation 1 to the same end. That
    makes +1 and -1 of any two heads, whatever they are worth, and lost more by every criterion (docs/log.md). A channel of the residual
    stream runs through two parts of every layer and counts once for each. Layers and parts of layers keep their scores.
    """
    values = dict(scores.values)
    for group in groups.groups:
        if group.kind in WHOLE:
            continue
        total = math.fsum(abs(value) for value in values[group.name])
        parts = 2 * groups.layers if group.kind == "residual" else 1
        values[group.name] = tuple(parts * value / total if total else 0.0 for value in values[group.name])
    return replace(scores, values=values)


SELECTORS.include(Selector("global", needs_curves=False, choose=global_threshold, compares_layers=True))
