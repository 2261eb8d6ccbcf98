"""A causal language model as a GGUF writer needs it: its config, the real sizes of its layers, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from regraft.models.family import Family
from regraft.models.view import LayerSizes, ModelView

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        config: Of the model.
        family: Where its modules are.
        sizes: Of each layer, read from the weights.
        width: Channels of the residual stream.
        vocabulary: Rows of the token embedding.
        tied: Whether the output projection is the token embedding.
        names: Of all tensors.
        tensor: Gives a tensor by name, when it is needed.
    """

    config: Any
    family: Family
    sizes: tuple[LayerSizes, ...]
    width: int
    vocabulary: int
    tied: bool
    names: frozenset[str]
    tensor: Callable[[str], Tensor]

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.sizes[0].head_dim

    @property
    def kind(self) -> str:
        """The family's ``model_type``, also of models with layers of different sizes."""
        return self.family.model_type

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same sizes and none has lost a part."""
        first = self.sizes[0]
        return all(size == first for size in self.sizes) and first.query_heads > 0 and first.ffn > 0


def source_of(model: PreTrainedModel) -> Source:
    """Returns what is exported of a model in memory."""
    view = ModelView(model)
    state: Mapping[str, Tensor] = model.state_dict()
    embedding = state[f"{view.family.embedding}.weight"]
    head = state.get(f"{view.family.head}.weight")
    return Source(
        config=model.config,
        family=view.family,
        sizes=tuple(view.sizes(index) for index in range(len(view.layers))),
        width=view.width,
        vocabulary=embedding.shape[0],
        tied=head is None or head.data_ptr() == embedding.data_ptr(),
        names=frozenset(state),
        tensor=lambda name: state[name].detach(),
    )


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: In the file.
        shape: In torch's order.
        make: Computes it, in any float type.
        exact: Whether it is kept in float32 whatever the file's type is, as runtimes ask of norms, biases and tables.
        reads: Name of the module whose inputs it multiplies, for an importance matrix; empty where there is none.
        layer: Index of its layer; -1 outside the layers.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    exact: bool = False
    reads: str = ""
    layer: int = -1


@dataclass(frozen=True)
class Layout:
    """A file that is ready to be written.

    Attributes:
        architecture: As the runtime names it.
        metadata: Keys below the architecture's name, without it, and their values.
        entries: In the order of the file.
        notes: What a user should know, in full sentences without a full stop.
        context: Tokens that the file promises.
    """

    architecture: str
    metadata: Metadata
    entries: tuple[Entry, ...]
    context: int
    notes: tuple[str, ...] = field(default=())
