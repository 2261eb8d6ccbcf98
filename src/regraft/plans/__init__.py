"""Values that pass between stages: frozen, compared by value, and equal after a round trip through JSON.

The decision of each stage is one of these values. They are printed by ``--dry-run``, stored in the run folder and in the saved model,
and can be replayed. Nothing here knows a model, a tensor or a file system. Other packages import the names from this package.
"""

from regraft.plans.factors import Factoring, FactorLayout, FactorPlan, FactorSite, FactorSpace, stored_numbers
from regraft.plans.groups import WHOLE, Group, GroupKind, Groups, Member, Side
from regraft.plans.json import from_json, to_dict, to_json
from regraft.plans.provenance import Provenance
from regraft.plans.prune import Curve, Curves, Cut, PrunePlan, Removed, Scores, Shape
from regraft.plans.ranks import (
    ALPHA_PER_RANK,
    RANK_CHOICES,
    Confirmation,
    CrossValidation,
    Finalist,
    PastSearch,
    RankPlan,
    RankSearch,
    RankSlot,
    RankSpace,
    RankTrial,
)
from regraft.plans.reports import LOSS_UNITS, LossReport, Measurement, SizeReport, SpeedReport
from regraft.plans.tasks import PairedScore, TaskReport, TaskScore

__all__ = [
    "ALPHA_PER_RANK",
    "LOSS_UNITS",
    "RANK_CHOICES",
    "WHOLE",
    "Confirmation",
    "CrossValidation",
    "Curve",
    "Curves",
    "Cut",
    "FactorLayout",
    "FactorPlan",
    "FactorSite",
    "FactorSpace",
    "Factoring",
    "Finalist",
    "Group",
    "GroupKind",
    "Groups",
    "LossReport",
    "Measurement",
    "Member",
    "PairedScore",
    "PastSearch",
    "Provenance",
    "PrunePlan",
    "RankPlan",
    "RankSearch",
    "RankSlot",
    "RankSpace",
    "RankTrial",
    "Removed",
    "Scores",
    "Shape",
    "Side",
    "SizeReport",
    "SpeedReport",
    "TaskReport",
    "TaskScore",
    "from_json",
    "stored_numbers",
    "to_dict",
    "to_json",
]
