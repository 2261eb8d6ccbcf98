"""The record of how a model folder was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.in_short import in_short
from regraft.plans.factors import FactorPlan
from regraft.plans.prune import PrunePlan
from regraft.plans.ranks import RankPlan


@dataclass(frozen=True, repr=False)
class Provenance:
    """The history of a model folder, written as ``regraft.json``.

    Attributes:
        command: The command or call that made the folder.
        source: The model that it was made from.
        source_fingerprint: Fingerprint of the source model.
        seed: Seed of every random draw.
        versions: Library name to version.
        plan: The prune plan, when units were cut.
        ranks: The rank plan, when adapters were trained.
        settings: Other settings of the stage.
        files: SHA-256 of every weight file, by name; checked when the folder is loaded.
        parents: The provenance of the earlier folders, oldest first.
        factors: The factor plan, when layers were factored.
    """

    command: str
    source: str
    source_fingerprint: str
    seed: int
    versions: Mapping[str, str]
    plan: PrunePlan | None = None
    ranks: RankPlan | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    parents: tuple[dict[str, Any], ...] = ()
    factors: FactorPlan | None = None

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)
