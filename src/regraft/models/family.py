"""A model family as data: where its modules are and which of their axes belong together.

One TOML file in ``architectures/`` per family. A new family that follows the decoder pattern is a new file and nothing else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import TypeAdapter

from regraft.errors import ModelError, did_you_mean
from regraft.models.inferred import describe
from regraft.plans import GroupKind, Side

Block = Literal["one", "head", "query_group", "fused"]


@dataclass(frozen=True)
class CoupledAxis:
    """One module of a decoder layer whose ``side`` carries the units of a group.

    Attributes:
        module: Name inside the layer, such as ``mlp.up_proj``.
        side: Output or input channels.
        block: Channels of one unit: ``one``, a ``head`` of the head dimension, the ``query_group`` of all query heads that
            share one key-value head, or ``fused`` where one matrix holds several projections.
    """

    module: str
    side: Side
    block: Block = "one"


@dataclass(frozen=True)
class Coupling:
    """Axes of one decoder layer that must be cut together."""

    kind: GroupKind
    axes: tuple[CoupledAxis, ...]


@dataclass(frozen=True)
class Keys:
    """How a family's config names its sizes.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads; empty where every query head has its own.
        ffn: Feed-forward channels; empty where they follow from the hidden size.
        norm_eps: What the norms of the residual stream add to the variance.
        width: Further keys that repeat the hidden size.
    """

    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    ffn: str = "intermediate_size"
    norm_eps: str = "rms_norm_eps"
    width: tuple[str, ...] = ()


@dataclass(frozen=True)
class SharedNorms:
    """Norms that serve both parts of a layer in one variant of a family, and stay when either is removed.

    Attributes:
        when: Config keys and the values that mark the variant.
        norms: Names inside a layer.
    """

    when: Mapping[str, Any]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Fixed:
    """Groups that cannot be cut in one variant of a family, because its classes compute with what they would lose.

    Attributes:
        kind: Of the groups.
        when: Config keys and the values that mark the variant.
        why: In words.
    """

    kind: GroupKind
    when: Mapping[str, Any]
    why: str


@dataclass(frozen=True)
class Family:
    """Where things are in a family of models, and what follows from what.

    Attributes:
        model_type: As in the Hugging Face config.
        model_class: Name of the causal language model in transformers.
        layers: Module name of the list of decoder layers.
        embedding: Module name of the token embedding.
        head: Module name of the output projection.
        final_norm: Module name of the last norm.
        attention: Name of the attention inside a layer.
        mlp: Name of the feed-forward network inside a layer.
        couplings: What must be cut together inside a layer.
        attention_norms: Norms inside a layer that serve the attention alone, and go with it when it is removed.
        mlp_norms: Norms inside a layer that serve the feed-forward network alone, and go with it when it is removed.
        shared_norms: In which variants some of these serve both.
        stand_in: A family of the same mathematics whose config accepts head counts that this one refuses, or None.
        discovery: Whether the couplings tell everything (``declared``), or the computation has to be followed (``traced``).
        keys: Names of sizes in the config.
        mlp_parts: The modules that are the feed-forward network where it is not one module; the last one writes the stream.
        transposed: Whether weights are (in, out), as ``Conv1D`` stores them.
        head_size: Whether the config has a ``head_dim`` (``explicit``), or the classes compute hidden size / heads (``derived``).
        writers: Names of the matrices that write the residual stream; needed where the head size is derived.
        apart: Modules outside the layers that have a width of their own wherever one of ``keys.width`` differs.
        width_from: Parameter whose last axis is as long as the residual stream is wide; the token embedding by default.
        norm: ``rms`` or ``layer``: what the norms of the residual stream are.
        norm_offset: What is added to the weight of a norm before it multiplies.
        head_norms: Norms inside the attention that use the same epsilon, and the projections that they read.
        scaled_embedding: Whether embeddings are multiplied by the square root of the hidden size.
        alibi: ``always`` where heads differ by a slope of their own (ALiBi), or the config key that switches this on.
        fixed: Which kinds of groups cannot be cut in which variants.
        stored_as: Modules that checkpoints know by another name, and that name.
        layer_output: What the classes expect a decoder layer to return: the hidden states, or a ``tuple`` that begins with them.
        single_kv_when: Config values with which all query heads share one key-value head whatever the config says.
    """

    model_type: str
    model_class: str
    layers: str
    embedding: str
    head: str
    final_norm: str
    attention: str
    mlp: str
    couplings: tuple[Coupling, ...]
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    shared_norms: tuple[SharedNorms, ...] = ()
    stand_in: str | None = None
    discovery: Literal["declared", "traced"] = "declared"
    keys: Keys = field(default_factory=Keys)
    mlp_parts: tuple[str, ...] = ()
    transposed: bool = False
    head_size: Literal["explicit", "derived"] = "explicit"
    writers: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    width_from: str = ""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    head_norms: Mapping[str, str] = field(default_factory=dict[str, str])
    scaled_embedding: bool = False
    alibi: str = ""
    fixed: tuple[Fixed, ...] = ()
    stored_as: Mapping[str, str] = field(default_factory=dict[str, str])
    layer_output: Literal["tensor", "tuple"] = "tensor"
    single_kv_when: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def has_alibi(self, config: Any) -> bool:
        """Returns whether the heads of a model differ by their slopes."""
        return self.alibi == "always" or bool(self.alibi and getattr(config, self.alibi))

    def parts(self, config: Any) -> dict[Literal["attention", "mlp"], tuple[str, ...]]:
        """Returns the modules inside a layer that go when its attention or its feed-forward network is removed."""
        stay = {norm for variant in self.shared_norms if matches(variant.when, config) for norm in variant.norms}
        attention = (self.attention, *(norm for norm in self.attention_norms if norm not in stay))
        mlp = (*(self.mlp_parts or (self.mlp,)), *(norm for norm in self.mlp_norms if norm not in stay))
        return {"attention": attention, "mlp": mlp}


def matches(when: Mapping[str, Any], config: Any) -> bool:
    """Returns whether a config has all of the given values; a key that it has not got is None."""
    return all(getattr(config, key, None) == value for key, value in when.items())


@cache
def families() -> dict[str, Family]:
    """Returns every declared family by ``model_type``."""
    adapter = TypeAdapter(Family)
    known: dict[str, Family] = {}
    folder = files("regraft.models") / "architectures"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            family = adapter.validate_python(tomllib.loads(entry.read_text(encoding="utf-8")))
            known[family.model_type] = family
    return known


def family_of(model_type: str) -> Family:
    """Returns the family of a ``model_type``; models that regraft saved unevenly count as what they were made from.

    One that has no table is looked at as transformers builds it: :mod:`regraft.models.inferred`.

    Raises:
        ModelError: The family is not declared, and cannot be inferred.
    """
    known = families()
    base = model_type.removeprefix("regraft_")
    if base in known:
        return known[base]
    try:
        return _inferred(base)
    except ModelError as error:
        names = ", ".join(known)
        raise ModelError(f"model family '{model_type}' is not known ({error}); known: {names}{did_you_mean(base, known)}") from None


@cache
def _inferred(model_type: str) -> Family:
    return TypeAdapter(Family).validate_python(describe(model_type))
