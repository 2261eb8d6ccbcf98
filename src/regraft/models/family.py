"""A model family as data: the names of its modules, and the coupling of their axes.

Each family is one TOML file in ``architectures/``. A new family of the usual decoder pattern needs only a new file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import TypeAdapter
from transformers import CONFIG_MAPPING

from regraft.errors import ModelError, did_you_mean
from regraft.models.inferred import describe
from regraft.plans import GroupKind, Side

Block = Literal["one", "head", "query_group", "gated", "each", "fused"]


@dataclass(frozen=True)
class CoupledAxis:
    """One module of a decoder layer, with the side that has the units of a group.

    Attributes:
        module: Name within the layer, such as ``mlp.up_proj``.
        side: Side of the units: output or input channels.
        block: Channels of one unit: ``one``, a ``head`` of the head dimension, the ``query_group`` of all query heads that share one
            key-value head, ``gated`` if a gate of their size is beside these in one matrix, ``each`` for one channel of each query head,
            or ``fused`` if one matrix holds several projections.
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
    """Names of the sizes in a family's config.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key-value heads; empty if every query head has its own.
        ffn: Number of feed-forward channels; empty if it is computed from the hidden size.
        norm_eps: Epsilon of the norms of the residual stream.
        width: Further keys with the value of the hidden size.
        per_layer: Lists with one entry for each layer, under the usual names of transformers.
        indices: Lists of the indices of layers.
        first_layers: Numbers of layers, counted from the first, that something holds for.
        last_layers: Numbers of layers, counted from the last, that use keys and values of layers before them.
        ffn_listed: Whether ``ffn`` is a list with a width for each layer.
        head_dim_listed: Whether layers have heads of several sizes, and the config lists those of single layers under ``per_layer_config``.
        heads_listed: A list with the number of query heads of each layer; empty where there is none.
        mixer: Numbers of key heads and of value heads of mixers, where their heads are known.
        mixer_evenly: Whether a unit of mixer heads is one value head of every key head.
        mixer_total: Channels of all value heads of a mixer, and of one; empty where the config has no entry for all.
        patterns: Keys of a pattern and its number of repetitions, each with the list that the family's config computes from it.
    """

    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    ffn: str = "intermediate_size"
    norm_eps: str = "rms_norm_eps"
    width: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ("layer_types", "mlp_layer_types", "no_rope_layers")
    indices: tuple[str, ...] = ()
    first_layers: tuple[str, ...] = ()
    last_layers: tuple[str, ...] = ()
    ffn_listed: bool = False
    head_dim_listed: bool = False
    heads_listed: str = ""
    mixer: tuple[str, ...] = ()
    mixer_evenly: bool = False
    mixer_total: tuple[str, ...] = ()
    patterns: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class SharedNorms:
    """Norms that serve both parts of a layer in one variant of a family, and are kept when one part is removed.

    Attributes:
        when: Config keys with the values of the variant.
        norms: Names within a layer.
    """

    when: Mapping[str, Any]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Fixed:
    """Groups that cannot be cut in one variant of a family, because its classes need the parts that a cut would remove.

    Attributes:
        kind: Kind of the groups.
        when: Config keys with the values of the variant.
        why: Reason in words.
    """

    kind: GroupKind
    when: Mapping[str, Any]
    why: str


@dataclass(frozen=True)
class Family:
    """Description of a family of models: names, couplings and conventions.

    Attributes:
        model_type: Model type in the Hugging Face config.
        model_class: Name of the causal language model class in transformers.
        layers: Module name of the list of decoder layers.
        embedding: Module name of the token embedding.
        head: Module name of the output projection.
        final_norm: Module name of the last norm.
        attention: Name of the attention within a layer.
        mlp: Name of the feed-forward network within a layer.
        couplings: Axes that must be cut together within a layer.
        attention_norms: Norms of a layer that serve only the attention, and are removed with it.
        mlp_norms: Norms of a layer that serve only the feed-forward network, and are removed with it.
        shared_norms: Variants in which some of these norms serve both parts.
        stand_in: A family of the same mathematics whose config accepts head counts that this one refuses, or None.
        discovery: ``declared`` if the couplings are complete, ``traced`` if groups are found by tracing the computation.
        keys: Names of the sizes in the config.
        mlp_parts: Modules of the feed-forward network if it is not a single module; the last one writes the residual stream.
        transposed: Whether weights are stored as (in, out), as in ``Conv1D``.
        head_size: ``explicit`` if the config has a ``head_dim``, ``derived`` if the classes compute hidden size / heads.
        writers: Names of the matrices that write the residual stream; needed if the head size is derived.
        apart: Modules outside the layers that have a different width if one of ``keys.width`` differs.
        width_from: Parameter whose last axis is the width of the residual stream; the token embedding by default.
        norm: Kind of the norms of the residual stream: ``rms`` or ``layer``.
        norm_offset: Number that is added to the weight of a norm before the multiplication.
        head_norms: Norms within the attention that use the same epsilon, and the projections that they read.
        scaled_embedding: Whether embeddings are multiplied by the square root of the hidden size.
        alibi: ``always`` if each head has its own position slope (ALiBi), or the config key that switches this on.
        fixed: Kinds of groups that cannot be cut, by variant.
        stored_as: Modules with another name in checkpoints, and that name.
        layer_output: Return value of a decoder layer: the hidden states, or a ``tuple`` that begins with them.
        single_kv_when: Config values with which all query heads share one key-value head, in spite of the config's number.
        mixed: Whether layers are of several kinds, of which some lack the attention or the feed-forward network.
        settings: Config values with which the widths in a config are meant as they are.
        for_each_layer: Parameters outside the layers that hold a slice for each of them, and the axis along which these follow one another.
        whole: Attentions, by their names within a layer, whose heads are not known, so that they are kept as they are.
        last_layer_stays: Whether the config gives the last layer a type of its own, so that no other can become the last.
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
    mixed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    for_each_layer: Mapping[str, int] = field(default_factory=dict[str, int])
    last_layer_stays: bool = False
    whole: tuple[str, ...] = ()

    def has_alibi(self, config: Any) -> bool:
        """Returns whether the heads of a model have different position slopes."""
        return self.alibi == "always" or bool(self.alibi and getattr(config, self.alibi))

    def parts(self, config: Any) -> dict[Literal["attention", "mlp"], tuple[str, ...]]:
        """Returns the modules of a layer that are removed with its attention or its feed-forward network."""
        stay = {norm for variant in self.shared_norms if matches(variant.when, config) for norm in variant.norms}
        attention = (self.attention, *(norm for norm in self.attention_norms if norm not in stay))
        mlp = (*(self.mlp_parts or (self.mlp,)), *(norm for norm in self.mlp_norms if norm not in stay))
        return {"attention": attention, "mlp": mlp}


def matches(when: Mapping[str, Any], config: Any) -> bool:
    """Returns whether a config has all of the given values; a missing key counts as None."""
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
    """Returns the family of a ``model_type``; an uneven model of regraft has the family of its original.

    A family without a table is inferred from a small model that transformers builds: :mod:`regraft.models.inferred`.

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
        # A name that transformers knows is no slip of the keyboard, however close it is to another.
        meant = "" if base in CONFIG_MAPPING else did_you_mean(base, known)
        names = f"known by tables: {', '.join(known)}; others are inferred where their layers are like these"
        raise ModelError(f"model family '{model_type}' is not known ({error}); {names}{meant}") from None


@cache
def _inferred(model_type: str) -> Family:
    return TypeAdapter(Family).validate_python(describe(model_type))
