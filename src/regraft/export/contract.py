"""The interface of exporters: their inputs and results, and the layers, runtimes and losses that each declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.adapters import LowRank
from regraft.models.load import Loaded
from regraft.registry import Registry
from regraft.settings import ExportSettings
from regraft.streaming.once import OnePass
from regraft.streaming.skeleton import Skeleton


@dataclass(frozen=True)
class Exportable:
    """An adapter of any method, as factors of the change of every module.

    Attributes:
        model: The base, with or without the adapter on it.
        base: Name of the base model, as its users know it.
        factors: Factors by full name of the module.
        modules: The base model's modules by the same names.
        names: Names of all modules of the base model.
        head: For a model for labels, parameters of the layers that were trained in full.
    """

    model: PreTrainedModel
    base: str
    factors: Mapping[str, LowRank]
    modules: Mapping[str, nn.Module]
    names: tuple[str, ...]
    head: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Holding:
    """The models that one runtime loads from a format: a row of the page "which export do I need".

    Attributes:
        runtime: Name of the program, with the architecture or class it uses.
        families: Model families.
        uneven: Sizes that may differ from layer to layer, in words; empty for none.
        numbers: Number types of the weights.
        lost: Abilities that the exported model loses, or costs that it has.
        proof: How an export is checked: ``run`` in that program, or ``rules``: by the rules of its published reader, without running it.
            For what begins with ``run``, a test has to carry the mark ``exports`` for every shape and every number type of the row.
        name: Name of the row among those of the format, by which tests mark what they prove; empty for the only row.
    """

    runtime: str
    families: str
    uneven: str
    numbers: str
    lost: str
    proof: str
    name: str = ""


@dataclass(frozen=True)
class Parity:
    """Comparison of the exported model in its runtime with ours, on a text.

    Attributes:
        runtime: The program that ran it.
        positions: Number of next-token distributions that were compared.
        largest: Largest difference of log-probabilities, in nats, over tokens that are not all but impossible.
        mean: Mean difference, in nats.
        agreement: Share of positions with the same likeliest token, ties of 1e-3 nats counted as equal.
        divergence: Mean Kullback-Leibler divergence from ours to theirs, in nats.
        perplexity: Perplexity of our model on the text's own next tokens.
        theirs: Perplexity of the exported model in the runtime, on the same tokens.
        characters: Number of characters that both tokenizers encode alike; 0 where the runtime takes our token ids.
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
    """Description of the files that an exporter wrote.

    Attributes:
        words: Description in a few words.
        file: The file or folder that a runtime opens, below the folder that was given.
        notes: Remarks for the user, as sentences without a full stop.
        facts: Further values for the record.
        files: SHA-256 of the weight files by name, where they are known from writing.
    """

    words: str
    file: Path
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, str] | None = None


@dataclass(frozen=True)
class AdapterFormat:
    """A format for an adapter without its base.

    Attributes:
        summary: Description in a few words.
        holds: The models that each runtime loads from it.
        write: Writes into an empty folder and returns a description in a few words.
    """

    summary: str
    holds: tuple[Holding, ...]
    write: Callable[[Exportable, Path], str]


@dataclass(frozen=True)
class ModelFormat:
    """A format for a complete model.

    Attributes:
        summary: Description in a few words.
        holds: The models that each runtime loads from it.
        refuse: Called before anything is written; refuses models that the format cannot hold and options that it does not have.
        write: Writes into an empty folder.
        check: Compares the written files, in their runtime, with the model; raises an error if they compute something else.
        takes_factors: Whether the format holds linear layers that are stored as two factors; where it does not, such models are refused.
        stream: Writes into an empty folder from a checkpoint that is read tensor by tensor; None for a format that needs the whole model.
        streams_uneven: Whether ``stream`` takes models of our class, whose layers have sizes of their own.
    """

    summary: str
    holds: tuple[Holding, ...]
    refuse: Callable[[Loaded, ExportSettings], None]
    write: Callable[[Loaded, Path, ExportSettings], Written]
    check: Callable[[Loaded, Path, Written, str, ExportSettings], Parity | None]
    takes_factors: bool = False
    stream: Callable[[Skeleton, OnePass, Path, ExportSettings], Written] | None = None
    streams_uneven: bool = True


Exporter = AdapterFormat | ModelFormat

EXPORTERS: Registry[Exporter] = Registry("export format", group="regraft.exporters", of=(AdapterFormat, ModelFormat))
