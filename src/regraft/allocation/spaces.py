"""Construction of rank spaces from a budget, and of rank plans from rank vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from regraft.allocation.contract import Ranks
from regraft.errors import InputError, PlanError, shown
from regraft.plans import ALPHA_PER_RANK, RankPlan, RankSlot, RankSpace

"""The rank choices of RankAdaptor (arXiv 2406.15734)."""


def rank_space(
    fingerprint: str, granularity: Literal["layer", "module"], slots: Sequence[RankSlot], choices: Sequence[int], budget: str | int
) -> RankSpace:
    """Returns the space of a search.

    Args:
        fingerprint: Fingerprint of the model.
        granularity: Kind of a slot: a layer or a module.
        slots: The slots, in the order of the model, with the shapes of the (pruned) model.
        choices: The ranks to choose from, in any order.
        budget: ``"r=8"`` for the parameters of rank 8 in every slot; or a number of trainable parameters.

    Raises:
        InputError: The budget or a rank is out of range; the message gives the limits.
        PlanError: A slot has no modules, or the features of the slots differ.
    """
    ordered = tuple(sorted(set(choices)))
    _check_slots(slots)
    _check_choices(slots, ordered)
    uniform, limit = _budget(slots, ordered, budget)
    return RankSpace(fingerprint, granularity, tuple(slots), ordered, limit, uniform)


def rank_plan(space: RankSpace, ranks: Ranks, method: str, alpha_per_rank: float = ALPHA_PER_RANK) -> RankPlan:
    """Returns the rank plan of a rank vector.

    Raises:
        PlanError: The vector does not belong to the space.
    """
    if len(ranks) != len(space.slots) or not space.holds(ranks):
        raise PlanError(
            f"ranks {list(ranks)} are not of this space: {len(space.slots)} slots, ranks {list(space.choices)}, {space.budget:,}"
            " trainable parameters at most; allocate again for this model"
        )
    named = {module: rank for slot, rank in zip(space.slots, ranks, strict=True) for module in slot.modules}
    return RankPlan(space.fingerprint, method, named, alpha_per_rank, space.cost(ranks))


def _check_slots(slots: Sequence[RankSlot]) -> None:
    if not slots:
        raise PlanError("there is nothing to give ranks to: no layer has a module that takes an adapter; name some")
    for slot in slots:
        if not slot.modules or slot.parameters_per_rank < 1:
            raise PlanError(f"{slot.name} has no module that takes an adapter; leave it out")
        if slot.features.keys() != slots[0].features.keys():
            raise PlanError(f"the features of {slot.name} are not those of {slots[0].name}; measure the same for every slot")


def _check_choices(slots: Sequence[RankSlot], choices: tuple[int, ...]) -> None:
    if any(rank < 1 for rank in choices):
        raise InputError(f"ranks {list(choices)} are not positive whole numbers; give some such as 2,4,6,8,10,12")
    if len(choices) < 2:
        raise InputError(f"ranks {list(choices)} leave nothing to choose; give two ranks or more")
    narrow = min(slots, key=lambda slot: slot.limit)
    wide = max(slots, key=lambda slot: slot.limit)
    if choices[0] > narrow.limit:
        raise InputError(f"rank {choices[0]} is above the {narrow.limit} that {narrow.name} can hold; give a smaller one in `ranks`")
    if choices[-1] > wide.limit:
        raise InputError(f"rank {choices[-1]} is above what any module can hold ({wide.limit} in {wide.name}); take it out of `ranks`")


def _budget(slots: Sequence[RankSlot], choices: tuple[int, ...], budget: str | int) -> tuple[int, int]:
    """Returns the uniform rank and the limit in trainable parameters."""
    per_rank = sum(slot.parameters_per_rank for slot in slots)
    smallest, largest = choices[0] * per_rank, sum(slot.parameters_per_rank * _most(slot, choices) for slot in slots)
    found = re.fullmatch(r"\s*(r\s*=\s*)?([0-9]{1,18})\s*", str(budget))
    if found is None:
        raise InputError(
            f"budget '{shown(budget, 40)}' is neither r=RANK nor a number of trainable parameters of at most 18 digits; write r=8 or 120000"
        )
    amount = int(found[2])
    if found[1]:
        narrow = min(slots, key=lambda slot: slot.limit)
        if amount not in choices:
            raise InputError(f"budget r={amount}: {amount} is not among the ranks {','.join(map(str, choices))}; add it to `ranks`")
        if amount > narrow.limit:
            raise InputError(f"budget r={amount}: rank {amount} is above the {narrow.limit} that {narrow.name} can hold; lower `budget`")
    limit = amount * per_rank if found[1] else amount
    named = f"budget r={amount} ({limit:,} parameters)" if found[1] else f"budget {limit:,}"
    if limit < smallest:
        raise InputError(
            f"{named} is below the smallest plan, rank {choices[0]} everywhere, which has {smallest:,} parameters; raise `budget`"
        )
    if limit == smallest:
        raise InputError(f"{named} allows rank {choices[0]} everywhere and nothing else; raise `budget`, or add a smaller rank to `ranks`")
    if limit >= largest:
        raise InputError(
            f"{named} is not below the largest plan, which has {largest:,} parameters: every layer can have its largest rank and there is "
            "nothing to allocate; lower `budget`, or add a larger rank to `ranks`"
        )
    allowed = [rank for rank in choices if rank * per_rank <= limit and all(rank <= slot.limit for slot in slots)]
    return allowed[-1], limit


def _most(slot: RankSlot, choices: tuple[int, ...]) -> int:
    return max(rank for rank in choices if rank <= slot.limit)
