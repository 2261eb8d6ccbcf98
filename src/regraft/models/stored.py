"""How the parameters of a model lie in its files: under other names than in memory, or as the matrices of single experts.

Many checkpoints are older than the classes that read them. transformers renames what it loads, stacks the experts of a layer, and undoes
both on saving. The functions here answer for names and shapes what transformers does with tensors, so that a checkpoint can be read and
written one parameter at a time. Shapes are found with tensors on the meta device, which hold no values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key, revert_weight_conversion

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint that a parameter is made from.

    Attributes:
        parts: Their names, in the order of the conversion.
        shape: Shape of the parameter.
        converter: What makes the parameter from several tensors; None where it is stored as it is.
        patterns: For each part, the pattern of the converter that it belongs to.
        renamed: Name that all parts have after renaming.
        name: Name of the parameter.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    converter: WeightConverter | None = None
    patterns: tuple[str, ...] = ()
    renamed: str = ""
    name: str = ""

    @property
    def plain(self) -> bool:
        """Whether the parameter is one tensor of the checkpoint, as it is."""
        return self.converter is None

    def made(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> Tensor:
        """Returns the parameter.

        Args:
            read: Returns a tensor of the checkpoint by name.
            model: The model that the parameter belongs to.
        """
        if self.converter is None:
            return read(self.parts[0])
        return _converted(self.converter, self.renamed, {part: read(part) for part in self.parts}, self.patterns, model)[self.name]


def sources_of(model: PreTrainedModel, stored: Shapes) -> dict[str, Source]:
    """Returns where transformers takes each parameter of a model from, for the parameters that a checkpoint holds.

    Args:
        model: The model; its weights are not read.
        stored: Name and shape of each tensor of the checkpoint.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Source] = {}
    together: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            found[renamed] = Source((name,), stored[name], name=renamed)
        else:
            together.setdefault(renamed, []).append((name, pattern))
    for renamed, entries in together.items():
        parts, patterns = zip(*entries, strict=True)
        converter = by_pattern[patterns[0]]
        empty = {part: torch.empty(stored[part], device="meta") for part in parts}
        for name, tensor in _converted(converter, renamed, empty, patterns, model).items():
            found[name] = Source(parts, tuple(tensor.shape), converter, patterns, renamed, name)
    return found


def written_of(model: PreTrainedModel, shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the tensors that transformers writes for each parameter of a model: name and shape.

    Parameters are left as they are where several of them are written as one tensor; transformers loads these as well.

    Args:
        model: A model of the class that is written; its sizes do not matter.
        shapes: Name and shape of each parameter.
    """
    found = {
        name: {key: tuple(tensor.shape) for key, tensor in as_written(model, name, torch.empty(shape, device="meta")).items()}
        for name, shape in shapes.items()
    }
    whole = revert_weight_conversion(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if {key: tuple(tensor.shape) for key, tensor in whole.items()} != {key: s for parts in found.values() for key, s in parts.items()}:
        return {name: {name: shape} for name, shape in shapes.items()}
    return found


def as_written(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that transformers writes for one parameter, by name."""
    return revert_weight_conversion(model, {name: tensor})


def _converted(
    converter: WeightConverter, renamed: str, tensors: Mapping[str, Tensor], patterns: Iterable[str], model: PreTrainedModel
) -> dict[str, Tensor]:
    """Returns the parameters that a converter makes from tensors of a checkpoint."""
    own = copy.deepcopy(converter)
    for (part, tensor), pattern in zip(tensors.items(), patterns, strict=True):
        own.add_tensor(renamed, part, pattern, tensor)  # pyright: ignore[reportArgumentType]
    made: Mapping[str, Tensor | list[Tensor]] = own.convert(renamed, model=model, config=model.config)
    return {name: value if isinstance(value, Tensor) else value[0] for name, value in made.items()}
