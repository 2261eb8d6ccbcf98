"""Prune a language model, regrow it low-rank, serve it anywhere.

>>> import regraft
>>> print(*sorted(regraft.__all__))
CompressedMatrixCompletion allocate_ranks complete_ratings compress evaluate evaluate_labels export inspect load prune recover run save

``import regraft`` is light: it makes the Auto classes of transformers know our unevenly pruned models as soon as they are used, and
the functions below import what they need when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regraft.models.uneven import register_on_import

if TYPE_CHECKING:
    from regraft.completion.complete import complete_ratings as complete_ratings
    from regraft.completion.estimator import CompressedMatrixCompletion as CompressedMatrixCompletion
    from regraft.models.load import load as load
    from regraft.models.save import save as save
    from regraft.pipelines.compress.compress import compress as compress
    from regraft.pipelines.evaluate import evaluate_model as evaluate
    from regraft.pipelines.evaluate_labels import evaluate_labels as evaluate_labels
    from regraft.pipelines.export import export
    from regraft.pipelines.inspect import inspect_model as inspect
    from regraft.pipelines.prune.prune import prune as prune
    from regraft.pipelines.ranks.allocate import allocate_ranks as allocate_ranks
    from regraft.pipelines.recover import recover_model as recover
    from regraft.pipelines.run.run import run as run

__all__ = [
    "CompressedMatrixCompletion",
    "allocate_ranks",
    "complete_ratings",
    "compress",
    "evaluate",
    "evaluate_labels",
    "export",
    "inspect",
    "load",
    "prune",
    "recover",
    "run",
    "save",
]

_PUBLIC = {
    "CompressedMatrixCompletion": ("regraft.completion.estimator", "CompressedMatrixCompletion"),
    "allocate_ranks": ("regraft.pipelines.ranks.allocate", "allocate_ranks"),
    "complete_ratings": ("regraft.completion.complete", "complete_ratings"),
    "compress": ("regraft.pipelines.compress.compress", "compress"),
    "evaluate": ("regraft.pipelines.evaluate", "evaluate_model"),
    "evaluate_labels": ("regraft.pipelines.evaluate_labels", "evaluate_labels"),
    "export": ("regraft.pipelines.export", "export"),
    "inspect": ("regraft.pipelines.inspect", "inspect_model"),
    "load": ("regraft.models.load", "load"),
    "prune": ("regraft.pipelines.prune.prune", "prune"),
    "recover": ("regraft.pipelines.recover", "recover_model"),
    "run": ("regraft.pipelines.run.run", "run"),
    "save": ("regraft.models.save", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'regraft' has no attribute '{name}'")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


register_on_import()
