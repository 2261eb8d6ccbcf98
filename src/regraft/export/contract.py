"""What an exporter of adapters is given and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters import LowRank
from regraft.registry import Registry


@dataclass(frozen=True)
class Exportable:
    """An adapter, whatever its method, as factors of every module's change.

    Attributes:
        model: The base, with or without the adapter on it.
        base: What its users call it.
        factors: By full name.
        modules: The plain modules of the same names.
        names: Of all modules of the plain model.
        head: Parameters of layers that were trained whole, of a model for labels.
    """

    model: PreTrainedModel
    base: str
    factors: Mapping[str, LowRank]
    modules: Mapping[str, nn.Module]
    names: tuple[str, ...]
    head: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


Exporter = Callable[[Exportable, Path], str]
"""Writes into an empty folder and returns in a few words what was written."""

EXPORTERS: Registry[Exporter] = Registry("export format", group="regraft.exporters")
