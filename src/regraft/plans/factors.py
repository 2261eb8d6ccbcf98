"""Plans of low-rank compression, which name the linear layers to factor and their ranks, and the space that they are chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from regraft.in_short import in_short

FactorLayout = Literal["plain", "pifa"]


def stored_numbers(rows: int, columns: int, rank: int, layout: FactorLayout) -> int:
    """Returns how many numbers a matrix takes at a rank; at the full one, or where factors would take more, it stays as it is.

    The order of the outputs in PIFA's layout, four bytes each, is no parameter and is not counted.

    >>> stored_numbers(8, 8, 3, "plain"), stored_numbers(8, 8, 3, "pifa"), stored_numbers(8, 8, 8, "plain")
    (48, 39, 64)
    """
    if rank >= min(rows, columns):
        return rows * columns
    return rank * (rows + columns - (rank if layout == "pifa" else 0))


@dataclass(frozen=True)
class FactorSite:
    """A linear layer that may be factored, and what each of its ranks costs.

    Attributes:
        name: Full name of the layer in the model.
        layer: Index of the decoder layer that it is in.
        kind: Last part of its name, such as ``q_proj``.
        rows: Width of its outputs.
        columns: Width of its inputs.
        new_bias: Numbers that a factored layer stores beside the two matrices: a bias where the layer has none.
        ranks: The choices, ascending; the last is the full rank, with which the layer stays dense.
        damage: Predicted cost of each choice, in the unit of the space; 0 for the last.
    """

    name: str
    layer: int
    kind: str
    rows: int
    columns: int
    new_bias: int
    ranks: tuple[int, ...]
    damage: tuple[float, ...]

    @property
    def full_rank(self) -> int:
        """The rank with which it stays dense."""
        return self.ranks[-1]

    def stored(self, rank: int, layout: FactorLayout) -> int:
        """Returns the parameters that are stored at a rank, without the bias that the layer has anyway."""
        numbers = stored_numbers(self.rows, self.columns, rank, layout)
        return numbers if rank >= self.full_rank else numbers + self.new_bias


@dataclass(frozen=True)
class FactorSpace:
    """The rank vectors that a compression chooses from.

    Attributes:
        fingerprint: Fingerprint of the model.
        method: The compression method that the damages were computed for.
        unit: Unit of the damages: ``nats`` add up over layers; ``share`` is the lost part of a layer's own squared output.
        layout: How factored layers are stored.
        parameters: All stored parameters of the model before.
        budget: Most parameters that the sites may store together.
        sites: Layers, in the order of the model.
    """

    fingerprint: str
    method: str
    unit: Literal["nats", "share"]
    layout: FactorLayout
    parameters: int
    budget: int
    sites: tuple[FactorSite, ...]

    @property
    def dense(self) -> int:
        """Parameters that the sites store as they are."""
        return sum(site.rows * site.columns for site in self.sites)

    def stored(self, ranks: Sequence[int]) -> int:
        """Returns the parameters that the sites store at a rank vector."""
        return sum(site.stored(rank, self.layout) for site, rank in zip(self.sites, ranks, strict=True))

    def predicted(self, ranks: Sequence[int]) -> float:
        """Returns the summed damage of a rank vector."""
        return sum(site.damage[site.ranks.index(rank)] for site, rank in zip(self.sites, ranks, strict=True))


@dataclass(frozen=True)
class Factoring:
    """One linear layer that is replaced by two factors.

    Attributes:
        module: Full name.
        rank: Width between the two factors.
        bias: Whether it has a bias, its own or one that keeps the mean of its outputs.
    """

    module: str
    rank: int
    bias: bool


@dataclass(frozen=True, repr=False)
class FactorPlan:
    """The layers that are factored, and their ranks.

    Attributes:
        fingerprint: Fingerprint of the model that the plan was made for.
        method: How layers are decomposed.
        choice: How the ranks were chosen.
        layout: How factored layers are stored.
        ratio: Share of all stored parameters that was to go.
        parameters_before: Parameters of the uncompressed model, embeddings included, tied ones counted once.
        parameters_after: Parameters stored in the compressed model.
        factorings: Layers that are factored, in the order of the model; what is not named stays dense.
        predicted_nats: Predicted divergence per token; None where damages are not in nats.
        made_with: Settings, seed and checksums of the texts, to make the same factors again.
    """

    fingerprint: str
    method: str
    choice: str
    layout: FactorLayout
    ratio: float
    parameters_before: int
    parameters_after: int
    factorings: tuple[Factoring, ...]
    predicted_nats: float | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    @property
    def achieved(self) -> float:
        """Share of the parameters that is gone."""
        return 1.0 - self.parameters_after / self.parameters_before

    def ranks(self) -> dict[str, int]:
        """Returns the rank of every factored layer by name."""
        return {entry.module: entry.rank for entry in self.factorings}
