"""Files of a rank search: the plan, PEFT's config for it, the report, all trials, and the record for meta-learning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from regraft.adapters import make_request
from regraft.adapters.peft_kinds import lora_config
from regraft.allocation import PAST
from regraft.models.load import Loaded
from regraft.models.view import ModelView
from regraft.plans import PastSearch, RankPlan, RankSearch, to_json
from regraft.report.ranks import to_markdown, trials_csv
from regraft.settings import RecoverSettings

RANKS, REPORT, TRIALS, SEARCH, LORA = "ranks.json", "report.md", "trials.csv", "search.json", "lora_config.json"


def texts_of(found: RankSearch, loaded: Loaded, identity: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of a search's files, by name.

    Args:
        found: Result of the search.
        loaded: The model.
        identity: Identity of the search, as plain JSON types.
    """
    texts = {
        RANKS: to_json(found.plan) + "\n",
        SEARCH: to_json(found) + "\n",
        REPORT: to_markdown(found),
        TRIALS: trials_csv(found),
        LORA: peft_config(loaded, found.plan),
    }
    return texts | ({PAST: to_json(past_search(found, loaded, identity)) + "\n"} if found.trials else {})


def peft_config(loaded: Loaded, plan: RankPlan) -> str:
    """Returns the arguments of PEFT's ``LoraConfig`` for a plan, as JSON: r, alpha, their patterns and the modules."""
    modules = ModelView(loaded.model).adapted_modules()
    config = lora_config(make_request(modules, RecoverSettings(ranks=plan), plan, 0), loaded.model)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    values = {name: getattr(config, name) for name in names} | {"target_modules": sorted(config.target_modules or ())}
    return json.dumps(values, indent=2) + "\n"


def past_search(found: RankSearch, loaded: Loaded, identity: Mapping[str, Any]) -> PastSearch:
    """Returns the record of a search for meta-learning."""
    record = loaded.provenance
    plan = record.plan if record is not None else None
    return PastSearch(
        space=found.space,
        trials=found.trials,
        model=record.source if record is not None else loaded.source,
        parameters=loaded.model.num_parameters(),
        ratio=plan.achieved if plan is not None else 0.0,
        settings=identity,
    )
