"""A causal language model as a GGUF writer needs it: its config, the real sizes of its layers, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from regraft.models.family import Family
from regraft.models.view import LayerSizes, ModelView
from regraft.streaming.once import OnePass

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        config: The model's config.
        family: The family, which names its modules.
        sizes: Sizes of each layer, read from the weights.
        width: Channels of the residual stream.
        vocabulary: Rows of the token embedding.
        tied: Whether the output projection is the token embedding.
        shapes: Shapes of all tensors by name.
        tensor: Returns a tensor by name, computed when it is called.
        pieces: Yields a matrix by name in blocks of rows; each is the whole matrix, or has a multiple of the given number of rows.
    """

    config: Any
    family: Family
    sizes: tuple[LayerSizes, ...]
    width: int
    vocabulary: int
    tied: bool
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]
    pieces: Callable[[str, int], Iterable[Tensor]]

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
        """Returns whether all layers have the same sizes and none has lost a part."""
        first = self.sizes[0]
        return all(size == first for size in self.sizes) and first.query_heads > 0 and first.ffn > 0


def source_of(model: PreTrainedModel, once: OnePass | None = None) -> Source:
    """Returns what is exported of a model.

    Args:
        model: The model, which gives names and shapes.
        once: The checkpoint that the values are read from; None for those in the model.
    """
    view = ModelView(model)
    state: Mapping[str, Tensor] = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding = f"{view.family.embedding}.weight"
    head = parameters.get(f"{view.family.head}.weight")
    return Source(
        config=model.config,
        family=view.family,
        sizes=tuple(view.sizes(index) for index in range(len(view.layers))),
        width=view.width,
        vocabulary=state[embedding].shape[0],
        tied=head is None or head is parameters[embedding],
        shapes={name: tuple(values.shape) for name, values in state.items()},
        tensor=once.tensor if once else lambda name: state[name].detach(),
        pieces=once.pieces if once else lambda name, together: (state[name].detach(),),
    )


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: Name of the tensor in the file.
        shape: Shape in torch's order of axes.
        make: Computes it, in any float type.
        exact: Whether it is kept in float32 whatever the file's type is, as runtimes ask of norms, biases and tables.
        reads: Name of the module whose inputs it multiplies, for an importance matrix; empty where there is none.
        layer: Index of its layer; -1 outside the layers.
        pieces: Computes the same tensor in blocks of rows, for a large one that is made row by row; None for one that is made at once.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    exact: bool = False
    reads: str = ""
    layer: int = -1
    pieces: Callable[[], Iterable[Tensor]] | None = None


@dataclass(frozen=True)
class Layout:
    """A file that is ready to be written.

    Attributes:
        architecture: Name of the architecture in the runtime.
        metadata: Keys below the architecture's name, without it, and their values.
        entries: The tensors, in the order of the file.
        notes: Remarks for the user, in full sentences without a full stop.
        context: Context length that the file states, in tokens.
    """

    architecture: str
    metadata: Metadata
    entries: tuple[Entry, ...]
    context: int
    notes: tuple[str, ...] = field(default=())
