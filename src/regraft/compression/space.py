"""The space of rank vectors: the ranks that each layer may take, with their stored parameters and predicted damage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from regraft.errors import InputError
from regraft.plans import Factoring, FactorLayout, FactorPlan, FactorSite, FactorSpace, stored_numbers

# Tried from the left where the user leaves the alignment to us.
AUTO_ALIGNMENTS = (8, 4, 2, 1)
# Steps of the smaller side that a rank may be in before the alignment is narrowed: with fewer, a layer has too few ranks to choose from.
_FEWEST_STEPS = 32


@dataclass(frozen=True)
class Priced:
    """A linear layer with the price of every rank.

    Attributes:
        name: Full name.
        layer: Index of its decoder layer.
        rows: Width of its outputs.
        columns: Width of its inputs.
        new_bias: Size of the bias that factoring adds to a layer without one; 0 for none.
        damage_K: Cost of truncating to each rank from 0 to the full one, float64 (k + 1,).
    """

    name: str
    layer: int
    rows: int
    columns: int
    new_bias: int
    damage_K: Tensor


def factor_space(
    priced: Sequence[Priced],
    *,
    fingerprint: str,
    method: str,
    unit: Literal["nats", "share"],
    layout: FactorLayout,
    parameters: int,
    ratio: float,
    align: int | None = None,
) -> FactorSpace:
    """Returns the rank vectors of a model under a budget.

    Args:
        priced: The layers that may be factored, in the order of the model.
        fingerprint: Fingerprint of the model.
        method: The method that the prices were computed for.
        unit: Unit of the damages; for ``share`` each is divided by the layer's damage at rank 0.
        layout: How factored layers are stored.
        parameters: All stored parameters of the model.
        ratio: Share of them to remove.
        align: Ranks are multiples of this; None: of 8, or less where a layer would have fewer than 32 ranks to choose from.

    Raises:
        InputError: No rank vector stores so little; the message says what is possible.
    """
    sites = tuple(_site(entry, unit, layout, align) for entry in priced)
    dense = sum(entry.rows * entry.columns for entry in priced)
    budget = dense - math.ceil(ratio * parameters)
    space = FactorSpace(fingerprint, method, unit, layout, parameters, budget, sites)
    least = space.stored([site.ranks[0] for site in sites])
    if budget < least:
        most = (dense - least) / parameters
        raise InputError(
            f"ratio {ratio:g} cannot be met by any rank: the layers hold {dense:,} of the {parameters:,} parameters, and at most "
            f"{most:.3f} of all can go; lower ratio{' or align' if align is not None and align > 1 else ''}, or prune channels as well"
        )
    return space


def _site(entry: Priced, unit: Literal["nats", "share"], layout: FactorLayout, align: int | None) -> FactorSite:
    full = min(entry.rows, entry.columns)
    step = align if align is not None else next(width for width in AUTO_ALIGNMENTS if full // width >= _FEWEST_STEPS or width == 1)
    dense = entry.rows * entry.columns
    ranks = [
        rank
        for rank in range(min(step, full), full, step)
        if stored_numbers(entry.rows, entry.columns, rank, layout) + entry.new_bias < dense
    ]
    damage = entry.damage_K
    if unit == "share":
        damage = damage / damage[0].clamp_min(1e-300)
    kind = entry.name.rpartition(".")[2]
    chosen = (*ranks, full)
    values = (*(float(damage[rank]) for rank in ranks), 0.0)
    return FactorSite(entry.name, entry.layer, kind, entry.rows, entry.columns, entry.new_bias, chosen, values)


def factor_plan(space: FactorSpace, ranks: Sequence[int], choice: str, ratio: float, biases: Mapping[str, bool]) -> FactorPlan:
    """Returns the plan of a rank vector.

    Args:
        space: The space that the vector is from.
        ranks: One rank for each site.
        choice: Name of the method that chose the ranks.
        ratio: Share of the parameters that was to be removed.
        biases: Whether each layer has a bias once it is factored.

    Raises:
        InputError: The vector stores more than the budget, or leaves everything dense.
    """
    stored = space.stored(ranks)
    if stored > space.budget:
        raise InputError(f"ranks store {stored:,} parameters, above the budget of {space.budget:,}; lower them")
    entries = tuple(
        Factoring(site.name, rank, biases[site.name]) for site, rank in zip(space.sites, ranks, strict=True) if rank < site.full_rank
    )
    if not entries:
        raise InputError(f"ratio {ratio:g} leaves every layer dense; raise it")
    return FactorPlan(
        fingerprint=space.fingerprint,
        method=space.method,
        choice=choice,
        layout=space.layout,
        ratio=ratio,
        parameters_before=space.parameters,
        parameters_after=space.parameters - space.dense + stored,
        factorings=entries,
        predicted_nats=space.predicted(ranks) if space.unit == "nats" else None,
    )


def with_damage(space: FactorSpace, damage: Mapping[str, Sequence[float]]) -> FactorSpace:
    """Returns the same space with other damages in nats, such as measured ones, by site."""
    sites = tuple(replace(site, damage=tuple(damage[site.name])) for site in space.sites)
    return replace(space, unit="nats", sites=sites)
