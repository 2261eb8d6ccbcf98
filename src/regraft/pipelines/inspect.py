"""Inspection of a model: layers, sizes, groups and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from regraft.groups.discover import discover
from regraft.in_short import in_short
from regraft.models.live import ModelLike, place_of, resting, take
from regraft.models.load import Loaded
from regraft.models.view import ModelView, parameter_count
from regraft.plans import GroupKind
from regraft.settings import LoadSettings, takes_settings, with_keywords
from regraft.surgery.adapter_folder import bare_base, is_adapter


@dataclass(frozen=True)
class InspectedLayer:
    """Sizes of one layer.

    Attributes:
        layer: Index of the layer.
        query_heads: Number of query heads.
        kv_heads: Number of key-value heads.
        head_dim: Channels of one head.
        ffn: Channels of the feed-forward network.
        parameters: Number of parameters of the layer.
    """

    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    parameters: int


@dataclass(frozen=True)
class InspectedGroup:
    """A group of coupled weights.

    Attributes:
        name: Such as ``layers.3.ffn``.
        kind: Such as ``ffn``.
        units: How many units it has.
        unit_parameters: How many parameters one unit holds.
    """

    name: str
    kind: GroupKind
    units: int
    unit_parameters: int


@dataclass(frozen=True, repr=False)
class InspectReport:
    """Facts of a model.

    Attributes:
        source: Folder, hub id or name of the model; for an adapter its folder.
        family: Model type of the config.
        model_class: Name of the model's class.
        fingerprint: Fingerprint of the weights.
        dtype: Type of the weights, such as ``bfloat16``.
        parameters: Number of parameters.
        prunable_parameters: Number of those in groups that can be cut.
        hidden_size: Channels of the residual stream.
        vocabulary: Rows of the embedding.
        tied_embeddings: Whether the head is the embedding.
        uniform: Whether all layers have the same sizes.
        layers: Sizes of the layers, in order.
        groups: Groups that can be cut; none where projections are stored as two factors.
        adapter: Facts of the adapter whose base this is: ``folder``, ``method``, ``modules``, ``ranks`` (the smallest and the largest; none
            for methods without), ``parameters`` and ``base`` (where that was found); None for a model.
    """

    source: str
    family: str
    model_class: str
    fingerprint: str
    dtype: str
    parameters: int
    prunable_parameters: int
    hidden_size: int
    vocabulary: int
    tied_embeddings: bool
    uniform: bool
    layers: tuple[InspectedLayer, ...]
    groups: tuple[InspectedGroup, ...]
    adapter: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        """Returns its attributes in one short line."""
        return in_short(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the facts as plain JSON types; ``model_class`` is under the key ``class``, ``adapter`` only where there is one."""
        found = {("class" if name == "model_class" else name): value for name, value in asdict(self).items()}
        lists = {"layers": list(found["layers"]), "groups": list(found["groups"])}
        return {name: value for name, value in (found | lists).items() if value is not None}


@takes_settings(LoadSettings)
def inspect_model(model: ModelLike, *, load: LoadSettings | None = None, **keywords: Any) -> InspectReport:
    """Returns the layers, sizes, groups and parameters of a model.

    Args:
        model: A ``PreTrainedModel`` in memory, which is left as it is; or a folder, a hub id, ``seedling``, or the folder of an adapter,
            whose base is looked at.
        load: How a folder or hub id is loaded.
        **keywords: Single settings of loading by name, such as ``dtype="float32"``.

    Raises:
        RegraftError: Anything that the user can mend, in one line.
    """
    (asked,) = with_keywords("regraft.inspect", keywords, load or LoadSettings())
    place = place_of(model)
    if place is not None and is_adapter(place):
        base, facts = bare_base(Path(place), asked)
        with resting(base.model):
            return replace(_facts(base), source=str(place), adapter=facts)
    loaded = take(model, None, asked)
    with resting(loaded.model):
        return _facts(loaded)


def _facts(loaded: Loaded) -> InspectReport:
    model, view = loaded.model, ModelView(loaded.model)
    groups = () if view.factored() else discover(view).groups  # nothing can be cut from what is factored
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    embedding_weight = dict(model.get_input_embeddings().named_parameters())["weight"]
    return InspectReport(
        source=loaded.source,
        family=view.family.model_type,
        model_class=type(model).__name__,
        fingerprint=loaded.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=parameter_count(model),
        prunable_parameters=sum(group.units * group.unit_parameters for group in groups),
        hidden_size=int(model.config.hidden_size),
        vocabulary=int(embedding_weight.shape[0]),
        tied_embeddings=bool(model.config.tie_word_embeddings),
        uniform=len(set(sizes)) == 1,
        layers=tuple(
            InspectedLayer(index, size.query_heads, size.kv_heads, size.head_dim, size.ffn, parameter_count(view.layers[index]))
            for index, size in enumerate(sizes)
        ),
        groups=tuple(InspectedGroup(group.name, group.kind, group.units, group.unit_parameters) for group in groups),
    )
