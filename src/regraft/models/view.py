"""Access to the parts of a causal language model: layers, projections, and their actual sizes.

Sizes are read from the weights, never from the config, so that they are right for unevenly pruned models.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.compat import names_of_experts
from regraft.errors import ModelError
from regraft.models.family import Family, family_of
from regraft.models.mixers import NO_ATTENTION, NO_MLP, mixer_of
from regraft.models.uneven.factored_regraft import FactoredLinear
from regraft.models.weights import memory_of

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer; zeros where a part was removed.

    Attributes:
        query_heads: Number of query heads.
        kv_heads: Number of key-value heads.
        head_dim: Channels of a head.
        ffn: Channels of the feed-forward network.
        slopes: Indices that the query heads had in the unpruned model, for families whose heads differ by a position slope (ALiBi);
            empty for other families.
        absent: Parts that the layer never had, in families with layers of several kinds: ``attention`` or ``mlp``.
        mixer: Key heads and value heads of its mixer; zeros without a mixer whose heads are known.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    slopes: tuple[int, ...] = ()
    absent: tuple[Literal["attention", "mlp"], ...] = ()
    mixer: tuple[int, int] = (0, 0)

    @property
    def removed(self) -> tuple[Literal["attention", "mlp"], ...]:
        """Parts that were removed from the layer."""
        widths: tuple[tuple[Literal["attention", "mlp"], int], ...] = (("attention", self.query_heads), ("mlp", self.ffn))
        return tuple(part for part, width in widths if not width and part not in self.absent)


class ModelView:
    """Names, modules and sizes of a causal language model of a known family.

    Args:
        model: Any ``PreTrainedModel`` whose ``config.model_type`` is declared in ``architectures/``.

    Raises:
        ModelError: The family is not known, or a module that it declares is missing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family: Family = family_of(model.config.model_type)
        try:
            self.layers: nn.ModuleList = model.get_submodule(self.family.layers)  # pyright: ignore[reportAttributeAccessIssue]
        except AttributeError:
            raise ModelError(
                f"{type(model).__name__} has no '{self.family.layers}'; its layers differ from family '{self.family.model_type}'"
            ) from None

    def head_dim_of(self, layer: int) -> int:
        """Returns the channels of one attention head of a layer."""
        return int(self.model.config.per_layer_config[layer].head_dim) if self.family.keys.head_dim_listed else self.head_dim

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, where all layers have the same. 1 in families whose heads are not known, and never cut."""
        if all(coupling.kind != "heads" for coupling in self.family.couplings):
            return 1
        config = self.model.config
        # A family that computes its head size takes no other from its config; ours do.
        own = self.family.head_size == "explicit" or config.model_type.startswith("regraft_")
        declared = getattr(config, "head_dim", None) if own else None
        return int(declared if declared else config.hidden_size // config.num_attention_heads)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.model.get_parameter(self.family.width_from or f"{self.family.embedding}.weight").shape[-1]

    def layer_name(self, index: int) -> str:
        """Returns the full module name of a decoder layer."""
        return f"{self.family.layers}.{index}"

    def linear(self, layer: int, name: str) -> nn.Linear | None:
        """Returns a projection of a layer by its name inside the layer, or None where that part was removed."""
        module = self.module(layer, name)
        return module if isinstance(module, nn.Linear) else None

    def module(self, layer: int, name: str) -> nn.Module | None:
        """Returns a module of a layer by its name inside the layer, or None where that part was removed."""
        try:
            return self.layers[layer].get_submodule(name)
        except AttributeError:
            return None

    def sizes(self, layer: int) -> LayerSizes:
        """Returns the sizes of a layer, read from its weights."""
        widths: dict[tuple[str, str], int] = {}
        keys: list[int] = []
        for coupling in self.family.couplings:
            for axis in coupling.axes:
                size = self._width(layer, axis.module, axis.side)
                widths[coupling.kind, axis.side] = widths.get((coupling.kind, axis.side), 0) + size
                keys += [size] if axis.block == "head" else []
        head_dim = self.head_dim_of(layer)
        query_heads, ffn = widths.get(("heads", "in"), 0) // head_dim, widths.get(("ffn", "in"), 0)
        # Queries, keys and values are written together, where one matrix holds several; what comes back is as wide as the queries.
        kv_heads = keys[0] // head_dim if keys else (widths.get(("heads", "out"), 0) // head_dim - query_heads) // 2
        if query_heads and not kv_heads:  # the keys are those of another layer
            kv_heads = int(getattr(self.model.config.per_layer_config[layer], self.family.keys.kv_heads))
        absent = self._absent(layer, query_heads, ffn) if self.family.mixed else ()
        mixer = mixer_of(self.layers[layer], self.model.config) if self.family.keys.mixer else None
        heads = (0, 0) if mixer is None else (mixer.key_heads, mixer.value_heads)
        return LayerSizes(query_heads, kv_heads, head_dim, ffn, self._slopes(layer, query_heads), absent, heads)

    def _absent(self, layer: int, query_heads: int, ffn: int) -> tuple[Literal["attention", "mlp"], ...]:
        """Returns the parts that a layer lacks, although nothing stands in the place of a removed one."""
        classes = {type(module).__name__ for module in self.layers[layer].modules()}
        found: tuple[tuple[Literal["attention", "mlp"], int, str], ...] = (("attention", query_heads, NO_ATTENTION), ("mlp", ffn, NO_MLP))
        return tuple(part for part, width, stand_in in found if not width and stand_in not in classes)

    def _width(self, layer: int, name: str, side: str) -> int:
        """Returns the inputs or outputs of a projection; 0 where it was removed."""
        module = self.module(layer, name)
        if isinstance(module, FactoredLinear):
            return module.in_features if side == "in" else module.out_features
        weight = getattr(module, "weight", None)
        return 0 if weight is None else weight.shape[int((side == "in") != self.family.transposed)]

    def _slopes(self, layer: int, heads: int) -> tuple[int, ...]:
        config = self.model.config
        if not self.family.has_alibi(config):
            return ()
        own = config.layer(layer).alibi_heads if config.model_type.startswith("regraft_") else None
        return tuple(own) if own else tuple(range(heads))

    def linear_names(self) -> tuple[str, ...]:
        """Returns the names, inside a layer, of all its linear projections, in declared order."""
        return tuple(axis.module for coupling in self.family.couplings for axis in coupling.axes)

    def adapted_modules(self) -> dict[str, nn.Linear]:
        """Returns every linear projection of every layer by full name, which LoRA adapts by default.

        A projection that is stored as two factors is represented by these. Names that PEFT takes for experts are left out.
        """
        found: dict[str, nn.Linear] = {}
        experts = names_of_experts(self.model.config.model_type)
        for index in range(len(self.layers)):
            for name in self.linear_names():
                if name.rpartition(".")[2] in experts:
                    continue
                module, full = self.module(index, name), f"{self.layer_name(index)}.{name}"
                match module:
                    case nn.Linear():
                        found[full] = module
                    case FactoredLinear():
                        found |= {f"{full}.reduce": module.reduce, f"{full}.expand": module.expand}
                    case _:  # removed, or a Conv1D
                        pass
        return found

    def factored(self) -> dict[str, FactoredLinear]:
        """Returns the projections that are stored as two factors, by full name."""
        return modules_of(self.model, FactoredLinear)


def modules_of(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Returns the modules of a class, or of one below it, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def refuse_factored(model: PreTrainedModel, source: str = "the model") -> None:
    """Refuses a model with linear layers that are stored as two factors.

    Args:
        model: The model.
        source: Name of the model in the message.

    Raises:
        ModelError: It has such layers.
    """
    found = list(modules_of(model, FactoredLinear))
    if found:
        raise ModelError(
            f"{source} is factored already ({len(found)} layers, such as '{found[0]}'); use the model that it was compressed from"
        )


def parameter_count(model: nn.Module) -> int:
    """Returns the number of parameters, each tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by name, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fingerprint(model: nn.Module) -> str:
    """Returns a short hash of names, shapes, dtypes and all values of every parameter.

    Models of equal architecture have different hashes as soon as one value differs. For a model without weights (on the meta device) only
    names, shapes and dtypes count.
    """
    parameters = list(model.named_parameters())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing lets other threads run meanwhile
        digests = list(threads.map(lambda entry: digest_of(entry[1]), parameters))
    return fingerprint_of(
        (name, tuple(parameter.shape), parameter.dtype, digest) for (name, parameter), digest in zip(parameters, digests, strict=True)
    )


def fingerprint_of(entries: Iterable[tuple[str, tuple[int, ...], torch.dtype, bytes | None]]) -> str:
    """Returns the fingerprint of a model from the digests of its parameters.

    Args:
        entries: Name, shape, dtype and :func:`digest_of` each parameter, in the order of ``named_parameters``; None for no values.
    """
    whole = hashlib.sha256()
    for name, shape, dtype, digest in entries:
        whole.update(f"{name} {shape} {dtype}".encode())
        whole.update(digest or b"")
    return whole.hexdigest()[:16]


def digest_of(tensor: Tensor) -> bytes | None:
    """Returns the SHA-256 of a tensor's values as they lie in memory, row after row; None where it has none (on the meta device)."""
    return None if tensor.is_meta else digest_of_pieces([tensor.detach()])


def digest_of_pieces(pieces: Iterable[Tensor]) -> bytes:
    """Returns the SHA-256 of a tensor that is given in blocks of rows."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memory_of(piece.to("cpu").contiguous()))
    return digest.digest()
