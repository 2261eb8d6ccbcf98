"""What exporters are given and give, and what each declares: which layers it holds, in which runtime, and what is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters import LowRank
from regraft.export.settings import ExportSettings
from regraft.models.load import Loaded
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


@dataclass(frozen=True)
class Holding:
    """What one runtime loads of a format: a row of the page "which export do I need".

    Attributes:
        runtime: Name of the program, with the architecture or class it uses.
        families: Model families.
        uneven: What may differ from layer to layer; empty for nothing.
        numbers: How weights can be stored.
        lost: What the exported model has no longer, or what it costs.
        proof: How an export is checked: ``run`` in that program, or ``rules``: against its published reader's, not run.
    """

    runtime: str
    families: str
    uneven: str
    numbers: str
    lost: str
    proof: str


@dataclass(frozen=True)
class Parity:
    """How the exported model in its runtime compares with ours on a text.

    Attributes:
        runtime: The program that ran it.
        positions: How many next-token distributions were compared.
        largest: Largest difference of log-probabilities, in nats, over tokens that are not all but impossible.
        mean: Mean difference, in nats.
        agreement: Share of positions with the same likeliest token, ties of 1e-3 nats counted as equal.
        divergence: Mean Kullback-Leibler divergence from ours to theirs, in nats.
        perplexity: Of ours, on the text's own next tokens.
        theirs: The same in the runtime.
        characters: How many characters both tokenizers encode alike; 0 where the runtime takes ours.
    """

    runtime: str
    positions: int
    largest: float
    mean: float
    agreement: float
    divergence: float
    perplexity: float
    theirs: float
    characters: int = 0

    def words(self) -> str:
        """Returns the comparison in one line."""
        tokens = f"; the same token ids on {self.characters:,} characters" if self.characters else ""
        return (
            f"checked in {self.runtime} on {self.positions} positions: largest difference {self.largest:.2g} nats, mean {self.mean:.2g}, "
            f"same likeliest token {100 * self.agreement:.1f} %, divergence {self.divergence:.2g} nats, perplexity {self.theirs:.4g} "
            f"(ours {self.perplexity:.4g}){tokens}"
        )


@dataclass(frozen=True)
class Written:
    """What an exporter wrote.

    Attributes:
        words: In a few words.
        file: The file or folder that a runtime opens, below the folder that was given.
        notes: What the user should know, as sentences without a full stop.
        facts: Further values for the record.
    """

    words: str
    file: Path
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class AdapterFormat:
    """A form of an adapter alone.

    Attributes:
        summary: What it is, in a few words.
        holds: What is loaded where.
        write: Writes into an empty folder and returns in a few words what was written.
    """

    summary: str
    holds: tuple[Holding, ...]
    write: Callable[[Exportable, Path], str]


@dataclass(frozen=True)
class ModelFormat:
    """A form of a whole model.

    Attributes:
        summary: What it is, in a few words.
        holds: What is loaded where.
        refuse: Called before anything is written; refuses what the format cannot hold and options that it has not got.
        write: Writes into an empty folder.
        check: Compares what was written, in its runtime, with the model; refuses what is not the same.
    """

    summary: str
    holds: tuple[Holding, ...]
    refuse: Callable[[Loaded, ExportSettings], None]
    write: Callable[[Loaded, Path, ExportSettings], Written]
    check: Callable[[Loaded, Path, Written, str, ExportSettings], Parity | None]


Exporter = AdapterFormat | ModelFormat

EXPORTERS: Registry[Exporter] = Registry("export format", group="regraft.exporters")
