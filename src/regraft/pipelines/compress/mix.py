"""Channels and ranks in one knapsack: each part of a layer loses units, or ranks, or stays whole, whichever costs the fewest nats.

The price of both is the divergence that is measured with one thing changed at a time: a group cut to a few widths and re-fitted, a
projection truncated to a few ranks. That such prices add up is the one approximation. What loses channels is cut first; then the
projections that are to lose ranks are decomposed anew, on the inputs that they have in the pruned model, and share what is left of the
budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from regraft.errors import InputError
from regraft.importance import Evidence, score
from regraft.models.load import Loaded
from regraft.models.view import ModelView
from regraft.numerics.multiple_choice import Table, solve
from regraft.pipelines.prune.prune import cut_to_plan
from regraft.pipelines.prune.resolved import budget_of, resolve
from regraft.plans import Cut, FactorSite, FactorSpace, Group, Groups, PrunePlan, Scores
from regraft.progress import Say
from regraft.selection.budget import best_units
from regraft.selection.sizes import at_sizes, sizes_of
from regraft.settings import CompressSettings, PruneSettings
from regraft.surgery.damage_curves import measure_curves

CRITERION = "surgeon"
ALIGN = 8


@dataclass(frozen=True)
class Mixed:
    """The parts that lose channels and the projections that lose ranks.

    Attributes:
        plan: The units to keep; None where nothing loses channels.
        factored: Names of the projections to factor.
        damage_nats: Sum of the predicted damages.
    """

    plan: PrunePlan | None
    factored: tuple[str, ...]
    damage_nats: float


def prune_settings(settings: CompressSettings) -> PruneSettings:
    """Returns the settings that channels are scored and re-fitted with: the calibration text is the same."""
    return PruneSettings(
        ratio=settings.ratio,
        calibration=settings.calibration,
        samples=settings.samples,
        seq_len=settings.seq_len,
        shape="per-layer",
        align=ALIGN,
    )


def mixed(loaded: Loaded, groups: Groups, space: FactorSpace, settings: CompressSettings, windows_NT: Tensor, seed: int, say: Say) -> Mixed:
    """Chooses what every part of every layer loses.

    Args:
        loaded: The model; left as it is.
        groups: Heads and feed-forward channels of that model.
        space: The ranks, with prices in nats.
        settings: The ratio.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        seed: Seed for the criterion.
        say: Called with a line of progress at intervals.

    Raises:
        InputError: The ratio cannot be met.
    """
    own = prune_settings(settings)
    view = ModelView(loaded.model)
    scores = score(CRITERION, Evidence(model=loaded.model, groups=groups, windows=windows_NT, seed=seed))
    curves = measure_curves(view, groups, scores, windows_NT, only=[group.name for group in groups.groups], say=say)
    budget = budget_of(groups, resolve(own, view, seed).settings)
    inside = {group.name: _sites_of(group, space) for group in groups.groups}
    alone = [site for site in space.sites if not any(site in sites for sites in inside.values())]
    stages: list[list[list[Table]]] = []
    widths: dict[str, list[int]] = {}
    for group in groups.groups:
        widths[group.name] = sizes_of(group, budget)
        damage, cost = at_sizes(curves.values[group.name], widths[group.name])
        channels = Table(tuple((curves.values[group.name].cost[-1] - cost).tolist()), tuple(damage.tolist()))
        stages.append([[channels], [_ranks(site, space) for site in inside[group.name]]])
    stages += [[[_ranks(site, space)]] for site in alone]
    target = settings.ratio * space.parameters
    most = sum(max(sum(max(table.removed) for table in tables) for tables in stage) for stage in stages)
    if target > most:
        raise InputError(
            f"ratio {settings.ratio:g} cannot be met: at most {most / space.parameters:.3f} of all parameters can go; lower ratio"
        )
    chosen = solve(stages, target, at_least=True)
    return _decided(groups, scores, space, settings.ratio, inside, widths, alone, stages, chosen)


def pruned_for(
    loaded: Loaded, groups: Groups, plan: PrunePlan, settings: CompressSettings, windows_NT: Tensor, seed: int, say: Say
) -> Loaded:
    """Returns the model with the channels of a plan gone and everything that read them re-fitted."""
    resolved = resolve(prune_settings(settings), ModelView(loaded.model), seed)
    return replace(loaded, model=cut_to_plan(loaded.model, groups, plan, resolved, windows_NT, say=say))


def _sites_of(group: Group, space: FactorSpace) -> list[FactorSite]:
    modules = {member.parameter.rpartition(".")[0] for member in group.members}
    return [site for site in space.sites if site.name in modules]


def _ranks(site: FactorSite, space: FactorSpace) -> Table:
    dense = site.rows * site.columns
    return Table(tuple(float(dense - site.stored(rank, space.layout)) for rank in site.ranks), site.damage)


def _decided(
    groups: Groups,
    scores: Scores,
    space: FactorSpace,
    ratio: float,
    inside: dict[str, list[FactorSite]],
    widths: dict[str, list[int]],
    alone: Sequence[FactorSite],
    stages: Sequence[Sequence[Sequence[Table]]],
    chosen: Sequence[tuple[int, list[int]]],
) -> Mixed:
    cuts: list[Cut] = []
    factored: list[str] = []
    removed = 0
    damage = sum(
        table.damage[row]
        for stage, (alternative, rows) in zip(stages, chosen, strict=True)
        for table, row in zip(stage[alternative], rows, strict=True)
    )
    for group, (alternative, rows) in zip(groups.groups, chosen[: len(groups.groups)], strict=True):
        if alternative == 0:
            kept = widths[group.name][rows[0]]
            if kept < group.units:
                cuts.append(Cut(group.name, best_units(scores.values[group.name], kept)))
                removed += (group.units - kept) * group.unit_parameters
        else:
            pairs = zip(inside[group.name], rows, strict=True)
            factored += [site.name for site, row in pairs if site.ranks[row] < site.full_rank]
    for site, (_, rows) in zip(alone, chosen[len(groups.groups) :], strict=True):
        if site.ranks[rows[0]] < site.full_rank:
            factored.append(site.name)
    plan = None
    if cuts:
        after = groups.parameters - removed
        plan = PrunePlan(groups.fingerprint, scores.criterion, "mix", "per-layer", ratio, ALIGN, groups.parameters, after, tuple(cuts))
    ordered = tuple(site.name for site in space.sites if site.name in set(factored))
    return Mixed(plan, ordered, damage)
