"""Prune a language model, regrow it low-rank, serve it anywhere.

Public is what ``regraft.__all__`` names, with the attributes and parameters that its documentation gives, and the names that the guide for
plug-ins (``docs/plugins.md``) gives to authors of methods. Everything else may change in any version.

>>> import regraft
>>> [name for name in dir(regraft) if name[0].islower()]  # doctest: +NORMALIZE_WHITESPACE
['allocate_ranks', 'compare_tasks', 'complete_ratings', 'compress', 'evaluate', 'evaluate_labels', 'evaluate_tasks', 'export',
 'inspect', 'load', 'prune', 'read_plan', 'recover', 'replay', 'run', 'save']

``import regraft`` is light: it makes the Auto classes of transformers know our unevenly pruned models as soon as they are used, and
the names import what they need when they are first asked for.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regraft.models.uneven import register_on_import

if TYPE_CHECKING:
    from regraft.completion.complete import complete_ratings as complete_ratings
    from regraft.completion.estimator import CompressedMatrixCompletion as CompressedMatrixCompletion
    from regraft.errors import ConfigError as ConfigError
    from regraft.errors import RegraftError as RegraftError
    from regraft.evaluation.scores import compare as compare_tasks
    from regraft.models.load import Loaded as Loaded
    from regraft.models.load import load as load
    from regraft.models.save import save as save
    from regraft.pipelines.compress.compress import CompressReport as CompressReport
    from regraft.pipelines.compress.compress import CompressResult as CompressResult
    from regraft.pipelines.compress.compress import compress as compress
    from regraft.pipelines.evaluate import evaluate_model as evaluate
    from regraft.pipelines.evaluate_labels import LabelReport as LabelReport
    from regraft.pipelines.evaluate_labels import evaluate_labels as evaluate_labels
    from regraft.pipelines.evaluate_tasks import evaluate_tasks as evaluate_tasks
    from regraft.pipelines.export import ExportResult as ExportResult
    from regraft.pipelines.export import export as export
    from regraft.pipelines.inspect import InspectReport as InspectReport
    from regraft.pipelines.inspect import inspect_model as inspect
    from regraft.pipelines.prune.plan_files import read_plan as read_plan
    from regraft.pipelines.prune.prune import prune as prune
    from regraft.pipelines.prune.prune import replay as replay
    from regraft.pipelines.prune.result import PruneReport as PruneReport
    from regraft.pipelines.prune.result import PruneResult as PruneResult
    from regraft.pipelines.ranks.allocate import RankResult as RankResult
    from regraft.pipelines.ranks.allocate import allocate_ranks as allocate_ranks
    from regraft.pipelines.recover import RecoverResult as RecoverResult
    from regraft.pipelines.recover import recover_model as recover
    from regraft.pipelines.run.run import RunResult as RunResult
    from regraft.pipelines.run.run import run as run
    from regraft.plans import Measurement as Measurement
    from regraft.plans import PrunePlan as PrunePlan
    from regraft.plans import RankPlan as RankPlan
    from regraft.plans import TaskReport as TaskReport
    from regraft.settings import AllocateSettings as AllocateSettings
    from regraft.settings import CompressSettings as CompressSettings
    from regraft.settings import EvaluateSettings as EvaluateSettings
    from regraft.settings import ExportSettings as ExportSettings
    from regraft.settings import LabelSettings as LabelSettings
    from regraft.settings import LoadSettings as LoadSettings
    from regraft.settings import PruneSettings as PruneSettings
    from regraft.settings import RecoverSettings as RecoverSettings
    from regraft.settings import TaskSettings as TaskSettings

__all__ = [
    "AllocateSettings",
    "CompressReport",
    "CompressResult",
    "CompressSettings",
    "CompressedMatrixCompletion",
    "ConfigError",
    "EvaluateSettings",
    "ExportResult",
    "ExportSettings",
    "LabelReport",
    "LabelSettings",
    "LoadSettings",
    "Loaded",
    "Measurement",
    "PrunePlan",
    "PruneReport",
    "PruneResult",
    "PruneSettings",
    "RankPlan",
    "RankResult",
    "RecoverResult",
    "RecoverSettings",
    "RegraftError",
    "RunResult",
    "TaskReport",
    "TaskSettings",
    "allocate_ranks",
    "compare_tasks",
    "complete_ratings",
    "compress",
    "evaluate",
    "evaluate_labels",
    "evaluate_tasks",
    "export",
    "inspect",
    "load",
    "prune",
    "read_plan",
    "recover",
    "replay",
    "run",
    "save",
]

_PUBLIC = {
    "AllocateSettings": ("regraft.settings", "AllocateSettings"),
    "CompressReport": ("regraft.pipelines.compress.compress", "CompressReport"),
    "CompressResult": ("regraft.pipelines.compress.compress", "CompressResult"),
    "CompressSettings": ("regraft.settings", "CompressSettings"),
    "CompressedMatrixCompletion": ("regraft.completion.estimator", "CompressedMatrixCompletion"),
    "ConfigError": ("regraft.errors", "ConfigError"),
    "EvaluateSettings": ("regraft.settings", "EvaluateSettings"),
    "ExportResult": ("regraft.pipelines.export", "ExportResult"),
    "ExportSettings": ("regraft.settings", "ExportSettings"),
    "InspectReport": ("regraft.pipelines.inspect", "InspectReport"),
    "LabelReport": ("regraft.pipelines.evaluate_labels", "LabelReport"),
    "LabelSettings": ("regraft.settings", "LabelSettings"),
    "LoadSettings": ("regraft.settings", "LoadSettings"),
    "Loaded": ("regraft.models.load", "Loaded"),
    "Measurement": ("regraft.plans", "Measurement"),
    "PrunePlan": ("regraft.plans", "PrunePlan"),
    "PruneReport": ("regraft.pipelines.prune.result", "PruneReport"),
    "PruneResult": ("regraft.pipelines.prune.result", "PruneResult"),
    "PruneSettings": ("regraft.settings", "PruneSettings"),
    "RankPlan": ("regraft.plans", "RankPlan"),
    "RankResult": ("regraft.pipelines.ranks.allocate", "RankResult"),
    "RecoverResult": ("regraft.pipelines.recover", "RecoverResult"),
    "RecoverSettings": ("regraft.settings", "RecoverSettings"),
    "RegraftError": ("regraft.errors", "RegraftError"),
    "RunResult": ("regraft.pipelines.run.run", "RunResult"),
    "TaskReport": ("regraft.plans", "TaskReport"),
    "TaskSettings": ("regraft.settings", "TaskSettings"),
    "allocate_ranks": ("regraft.pipelines.ranks.allocate", "allocate_ranks"),
    "compare_tasks": ("regraft.evaluation.scores", "compare"),
    "complete_ratings": ("regraft.completion.complete", "complete_ratings"),
    "compress": ("regraft.pipelines.compress.compress", "compress"),
    "evaluate": ("regraft.pipelines.evaluate", "evaluate_model"),
    "evaluate_labels": ("regraft.pipelines.evaluate_labels", "evaluate_labels"),
    "evaluate_tasks": ("regraft.pipelines.evaluate_tasks", "evaluate_tasks"),
    "export": ("regraft.pipelines.export", "export"),
    "inspect": ("regraft.pipelines.inspect", "inspect_model"),
    "load": ("regraft.models.load", "load"),
    "prune": ("regraft.pipelines.prune.prune", "prune"),
    "read_plan": ("regraft.pipelines.prune.plan_files", "read_plan"),
    "recover": ("regraft.pipelines.recover", "recover_model"),
    "replay": ("regraft.pipelines.prune.prune", "replay"),
    "run": ("regraft.pipelines.run.run", "run"),
    "save": ("regraft.models.save", "save"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("regraft")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'regraft' has no attribute '{name}'")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """The package's module, in which a public name stays what it is when a room of the same name (``regraft.export``) is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_on_import()
