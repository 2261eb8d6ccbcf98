"""A model family as data: where its modules are and which of their axes belong together.

One TOML file in ``architectures/`` per family. A new family that follows the decoder pattern is a new file and nothing else.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import TypeAdapter

from regraft.errors import ModelError, did_you_mean
from regraft.plans import GroupKind, Side

Block = Literal["one", "head", "query_group"]


@dataclass(frozen=True)
class CoupledAxis:
    """One module of a decoder layer whose ``side`` carries the units of a group.

    Attributes:
        module: Name inside the layer, such as ``mlp.up_proj``.
        side: Output or input channels.
        block: Channels of one unit: ``one``, a ``head`` of the head dimension, or the ``query_group`` of all query heads that
            share one key-value head.
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
class Family:
    """Where things are in a family of models.

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
        stand_in: A family of the same mathematics whose config accepts head counts that this one refuses, or None.
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
    stand_in: str | None = None


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

    Raises:
        ModelError: The family is not declared.
    """
    known = families()
    base = model_type.removeprefix("regraft_")
    if base not in known:
        names = ", ".join(known)
        raise ModelError(f"model family '{model_type}' is not known; known: {names}{did_you_mean(base, known)}")
    return known[base]
