"""Methods that choose the ranks of all layers from their prices, under one hard budget of stored parameters.

Each choice is a pure function of the space to one rank for each site; what is left of the budget after rounding goes where a parameter buys
most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from regraft.numerics.multiple_choice import Table, solve
from regraft.plans import FactorSite, FactorSpace
from regraft.registry import Registry

Choose = Callable[[FactorSpace], tuple[int, ...]]
RANK_CHOICES: Registry[Choose] = Registry("choice of ranks", group="regraft.rank_choices")

SHARES = 200  # steps of a share of a layer's dense size, for what is chosen by share
_BISECTIONS = 80


@RANK_CHOICES.register("uniform")
def uniform(space: FactorSpace) -> tuple[int, ...]:
    """Keeps the same share of every layer: the rank r at which r (m + n) is that share of m n."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if space.stored(_at_share(space, middle)) <= space.budget else (low, middle)
    ranks = _at_share(space, low)
    # Rounding down leaves something over: a step more for the layers that lost most by it, never more than one.
    order = sorted(range(len(ranks)), key=lambda index: _exact(space, space.sites[index], low) - ranks[index], reverse=True)
    for index in order:
        raised = _next_rank(space.sites[index], ranks[index])
        longer = [*ranks[:index], raised, *ranks[index + 1 :]]
        if raised < space.sites[index].full_rank and space.stored(longer) <= space.budget:
            ranks = longer
    return tuple(ranks)


@RANK_CHOICES.register("type")
def by_type(space: FactorSpace) -> tuple[int, ...]:
    """Keeps one share of all layers of a kind (queries, up projections, ...), with the least predicted damage over the kinds' shares."""
    kinds = tuple(dict.fromkeys(site.kind for site in space.sites))
    members = {kind: [index for index, site in enumerate(space.sites) if site.kind == kind] for kind in kinds}
    shares = [(step + 1) / SHARES for step in range(SHARES)]
    stages: list[Table] = []
    for kind in kinds:
        rows = [[rank_at_share(space, space.sites[index], share) for index in members[kind]] for share in shares]
        stages.append(_table([space.sites[index] for index in members[kind]], rows, space))
    chosen = solve([[[table]] for table in stages], float(space.dense - space.budget), at_least=True)
    ranks = [0] * len(space.sites)
    for kind, (_, (row,)) in zip(kinds, chosen, strict=True):
        for index in members[kind]:
            ranks[index] = rank_at_share(space, space.sites[index], shares[row])
    return settle(space, ranks)


@RANK_CHOICES.register("closed")
def closed(space: FactorSpace) -> tuple[int, ...]:
    """Water-filling: one price for a parameter everywhere, at which every layer takes the rank that is best for itself.

    For plain factors these are the singular values with the largest ``s^2 / (m + n)`` of all layers together.
    """

    def at(price: float) -> list[int]:
        costs = [np.asarray(site.damage) + price * _stored(space, site) for site in space.sites]
        return [site.ranks[int(cost.argmin())] for site, cost in zip(space.sites, costs, strict=True)]

    low, high = 0.0, 1.0
    while space.stored(at(high)) > space.budget and high < 1e30:
        high *= 4.0
    if high >= 1e30:
        return settle(space, [site.ranks[0] for site in space.sites])
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if space.stored(at(middle)) <= space.budget else (middle, high)
    return settle(space, at(high))


@RANK_CHOICES.register("knapsack")
def knapsack(space: FactorSpace) -> tuple[int, ...]:
    """Takes the least summed damage of all rank vectors within the budget, exactly up to a grid of costs."""
    tables = [_table([site], [[rank] for rank in site.ranks], space) for site in space.sites]
    chosen = solve([[[table]] for table in tables], float(space.dense - space.budget), at_least=True)
    return settle(space, [site.ranks[rows[0]] for site, (_, rows) in zip(space.sites, chosen, strict=True)])


def settle(space: FactorSpace, ranks: Sequence[int]) -> tuple[int, ...]:
    """Makes a rank vector meet the budget: lowers ranks where that costs least for a parameter, then spends what is left."""
    found = list(ranks)
    spent = space.stored(found)
    while spent > space.budget:
        index, rank, saved = _best_step(space, found, down=True)
        found[index], spent = rank, spent - saved
    while True:
        index, rank, saved = _best_step(space, found, down=False, room=space.budget - spent)
        if index < 0:
            return tuple(found)
        found[index], spent = rank, spent - saved


def _best_step(space: FactorSpace, ranks: Sequence[int], *, down: bool, room: int = 0) -> tuple[int, int, int]:
    """Returns the site whose rank to change, its new rank, and the parameters that this saves; -1 where no step fits.

    Steps up may skip ranks: to go from factors to the dense layer is one step, however far.
    """
    best, found = np.inf, (-1, 0, 0)
    for index, (site, rank) in enumerate(zip(space.sites, ranks, strict=True)):
        place = site.ranks.index(rank)
        here = site.stored(rank, space.layout)
        targets = ((place - 1,) if place else ()) if down else (place + 1, len(site.ranks) - 1)
        for target in targets:
            if target >= len(site.ranks) or target == place:
                continue
            saved = here - site.stored(site.ranks[target], space.layout)
            harm = site.damage[target] - site.damage[place]
            if (down and saved <= 0) or (not down and (-saved > room or harm >= 0.0)):
                continue
            price = harm / abs(saved) if saved else -np.inf
            if price < best:
                best, found = price, (index, site.ranks[target], saved)
    return found


def _stored(space: FactorSpace, site: FactorSite) -> np.ndarray:
    return np.array([site.stored(rank, space.layout) for rank in site.ranks], dtype=np.float64)


def _table(sites: Sequence[FactorSite], rows: Sequence[Sequence[int]], space: FactorSpace) -> Table:
    dense = sum(site.rows * site.columns for site in sites)
    removed = [float(dense - sum(site.stored(rank, space.layout) for site, rank in zip(sites, row, strict=True))) for row in rows]
    damage = [sum(site.damage[site.ranks.index(rank)] for site, rank in zip(sites, row, strict=True)) for row in rows]
    return Table(tuple(removed), tuple(damage))


def _at_share(space: FactorSpace, share: float) -> list[int]:
    return [rank_at_share(space, site, share) for site in space.sites]


def rank_at_share(space: FactorSpace, site: FactorSite, share: float) -> int:
    """Returns the largest rank of a site that stores at most a share of its dense size, or its smallest rank."""
    if share >= 1.0:
        return site.full_rank
    most = share * site.rows * site.columns
    return max((rank for rank in site.ranks[:-1] if site.stored(rank, space.layout) <= most), default=site.ranks[0])


def _exact(space: FactorSpace, site: FactorSite, share: float) -> float:
    """Returns the rank, as a real number, at which a site stores a share of its dense size."""
    sides, wanted = site.rows + site.columns, share * site.rows * site.columns
    if space.layout == "plain":
        return wanted / sides
    return 0.5 * (sides - (max(0.0, sides * sides - 4.0 * wanted)) ** 0.5)


def _next_rank(site: FactorSite, rank: int) -> int:
    return site.ranks[min(site.ranks.index(rank) + 1, len(site.ranks) - 1)]
