"""Ranks of a recovery that names no plan: one for all layers, or proportional to what pruning took from each.

Proportional ranks cost no search, and the same trained parameters as one rank for all. On models whose layers lost unequal shares they
gained as much as a search did (docs/log.md, "On real models the pruned share says almost everything about ranks").
"""

from __future__ import annotations

from regraft.allocation import rank_plan, rank_space
from regraft.allocation.features import SHARE_PRUNED
from regraft.allocation.proportional import proportional
from regraft.models.load import Loaded
from regraft.models.view import ModelView
from regraft.pipelines.prune.removal_record import in_all
from regraft.pipelines.ranks.layer_features import bare_slots, damage_of
from regraft.plans import RankPlan
from regraft.settings import RecoverSettings

MEASURED = "lora"  # the adapter that they were measured with
_SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # of the rank: those of a search, and wider for a model of which one part went
_EQUAL = 1e-3  # shares that differ by less come from rounding widths


def pattern_of(settings: RecoverSettings, loaded: Loaded) -> RankPlan | None:
    """Returns the ranks of a recovery without a plan; None for the rank of the settings in every layer.

    Args:
        settings: Settings of the recovery.
        loaded: The model, with its record.

    Raises:
        PlanError: Proportional ranks were asked for, and nothing is known of what pruning took, or the layers are too narrow.
        InputError: The rank leaves nothing to choose.
    """
    asked, own = settings.rank_pattern, settings.adapter != MEASURED or settings.alpha is not None or bool(settings.targets)
    if asked == "uniform" or (asked == "auto" and (own or not in_all(loaded.provenance))):
        return None
    view = ModelView(loaded.model)
    if asked == "auto" and not view.adapted_modules():  # GPT-2's projections are no nn.Linear; PEFT adapts them with one rank
        return None
    bare = bare_slots(view, "layer")
    damage = damage_of(loaded, bare)
    shares = [found[SHARE_PRUNED] for found in damage.values()]
    slots = [slot.plain(damage.get(slot.name)) for slot in bare]
    widest = max(slot.limit for slot in slots)
    choices = tuple(sorted({rank for share in _SHARES if 1 <= (rank := round(settings.rank * share)) <= widest}))
    if asked == "auto":
        equal = not shares or max(shares) - min(shares) < _EQUAL
        if equal or settings.rank < 2 or settings.rank > min(slot.limit for slot in slots):
            return None
    space = rank_space(loaded.fingerprint, "layer", slots, choices, f"r={settings.rank}")
    return rank_plan(space, proportional(space), "proportional")
