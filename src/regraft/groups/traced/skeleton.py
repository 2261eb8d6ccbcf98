"""A skeleton of a model (fake weights, one layer of each kind) and the graph of its computation.

The couplings of a layer do not depend on its weights, and layers of one kind have the same couplings. A copy with fake weights and one
layer of each kind is therefore enough. It takes no memory and is exported in a second or two, for any depth of the model. Mixers
(:mod:`regraft.models.mixers`) are never cut, so that they are not followed either.
"""
# pyright: standard
# (torch.fx and NumPy leave most types unknown)

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from regraft.compat import fake_tensors
from regraft.errors import ModelError
from regraft.groups.traced.interpreter import LARGEST_KNOWN, REMEDY
from regraft.models.mixers import mixers_of
from regraft.models.quiet import quiet

# One sequence of three tokens, because models may treat a single token as a special case.
TOKENS = 3
NUMBERING = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model, sorted by kind.

    Attributes:
        name: Name of the module list that holds the layers.
        kinds: Indices of the layers of each kind, ascending; kinds are in the order of their first layers.
    """

    name: str
    kinds: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Number of layers."""
        return sum(len(kind) for kind in self.kinds)

    def index(self, parameter: str) -> int | None:
        """Returns the layer that a parameter belongs to, or None outside the layers."""
        prefix = f"{self.name}."
        head = parameter.removeprefix(prefix).partition(".")[0]
        return int(head) if parameter.startswith(prefix) else None

    def renamed(self, parameter: str, layer: int) -> str:
        """Returns the name that a parameter of a layer has in another layer."""
        prefix = f"{self.name}."
        rest = parameter.removeprefix(prefix).partition(".")[2]
        return f"{prefix}{layer}.{rest}"

    def representative(self, name: str) -> str:
        """Turns a name in the skeleton, where layer ``i`` stands for kind ``i``, into the name in the model's first layer of the kind."""
        index = self.index(name)
        return name if index is None else self.renamed(name, self.kinds[index][0])


@dataclass(frozen=True)
class Graph:
    """An exported computation.

    Attributes:
        module: Graph of aten operators.
        parameters: Placeholder name to parameter name in the model, with the model's layer numbers.
        constants: Placeholder name to the value of a buffer or constant, if it is known and small.
    """

    module: fx.GraphModule
    parameters: dict[str, str]
    constants: dict[str, Tensor]


def without_weights(config: PreTrainedConfig) -> nn.Module:
    """Returns a causal language model on the meta device.

    Raises:
        ModelError: transformers has no such model for this config.
    """
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(config).eval()
    except ValueError as error:
        raise ModelError(f"no causal language model can be built from this config: {_line(error)}; give a decoder's config") from None


def find_layers(model: nn.Module) -> Layers:
    """Returns the decoder layers: the outermost module list with the most parameters.

    Raises:
        ModelError: The model has no module list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers, so there is nothing to prune by layer; {REMEDY}")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(lists[name]):
        kinds.setdefault(_kind(layer), []).append(index)
    return Layers(name, tuple(tuple(indices) for indices in kinds.values()))


def export(model: nn.Module, layers: Layers, whole: Collection[str] = ()) -> Graph:
    """Exports the computation of a model's skeleton.

    Args:
        model: Any causal language model that takes token ids; it is not changed.
        layers: Layers of the model.
        whole: Attentions, by their names within a layer, that are never cut and not followed.

    Raises:
        ModelError: ``torch.export`` cannot capture the computation.
    """
    every: Any = model.get_submodule(layers.name)
    mixing = any(mixers_of(every[kind[0]]) for kind in layers.kinds)
    # As it is usually; with mixers that return pairs; with something outside the layers that holds a part for each of them.
    attempts = [(False, True), *([(True, True)] if mixing else []), (False, False)]
    errors: list[Exception] = []
    program: Any = None
    for paired, shorter in attempts:
        try:
            program = _exported(_skeleton(model, layers, whole, paired=paired, shorter=shorter))
            break
        except Exception as error:  # whatever the model's own code raises
            errors.append(error)
    else:
        first = errors[0]
        raise ModelError(
            f"the computation of {type(model).__name__} cannot be exported ({type(first).__name__}: {_line(first)}); {REMEDY}"
        ) from first
    signature = program.graph_signature
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    canonical = {name: names[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    parameters = {holder: canonical[layers.representative(name)] for holder, name in signature.inputs_to_parameters.items()}
    values = dict(model.named_buffers())
    constants = {holder: values.get(layers.representative(name)) for holder, name in signature.inputs_to_buffers.items()}
    constants |= {holder: program.constants.get(name) for holder, name in signature.inputs_to_lifted_tensor_constants.items()}
    known = {holder: value.cpu() for holder, value in constants.items() if isinstance(value, Tensor) and _is_small(value)}
    return Graph(program.graph_module, parameters, known)


def _exported(small: nn.Module) -> Any:
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    accepts = inspect.signature(small.forward).parameters
    with quiet(), torch.no_grad():
        return torch.export.export(small, (ids,), kwargs={"use_cache": False} if "use_cache" in accepts else None, strict=False)


def _is_small(value: Tensor) -> bool:
    real = type(value) in (Tensor, nn.Parameter, nn.Buffer)
    return real and not value.is_meta and value.numel() <= LARGEST_KNOWN


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Returns a key that is equal for layers of equal computation: classes, shapes and settings, without layer numbers."""
    described: list[Any] = []
    for name, module in layer.named_modules():
        settings = tuple(
            sorted(
                (key, value)
                for key, value in vars(module).items()
                if key not in NUMBERING and key != "training" and isinstance(value, bool | int | str)
            )
        )
        shapes = tuple((key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False))
        described.append((name, type(module), settings, shapes))
    return tuple(described)


def _skeleton(model: nn.Module, layers: Layers, whole: Collection[str], *, paired: bool, shorter: bool) -> nn.Module:
    """Returns a copy on the CPU with fake parameters and the first layer of each kind; real buffers are kept."""
    memo: dict[int, Any] = {}
    with fake_tensors():
        for parameter in model.parameters():
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(fake, requires_grad=False)
        for buffer in model.buffers():
            if buffer.is_meta:
                memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    memo |= {id(buffer): buffer.cpu() for buffer in model.buffers() if not buffer.is_meta}
    every: Any = model.get_submodule(layers.name)
    memo[id(every)] = nn.ModuleList(_without_mixers(copy.deepcopy(every[kind[0]], memo), whole, paired=paired) for kind in layers.kinds)
    small = copy.deepcopy(model, memo).eval()
    configs: dict[int, Any] = {}
    for module in small.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, key, value.cpu())
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs[id(config)] = config
    for config in configs.values():
        _shorten(config, layers.count, [kind[0] for kind in layers.kinds], shorter=shorter)
    return small


class _PassedOn(nn.Module):
    """A stand-in for a mixer, which hands on the hidden states: all that is known of a mixer's output is that it is as wide.

    Args:
        paired: Whether it returns a pair, as experts do whose router's scores are returned too.
    """

    def __init__(self, *, paired: bool) -> None:
        super().__init__()
        self.paired = paired

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Returns a copy of the hidden states, (batch, tokens, hidden), alone or with None."""
        hidden = named["hidden_states"] if "hidden_states" in named else positional[0]
        return (hidden.clone(), None) if self.paired else hidden.clone()


def _without_mixers(layer: nn.Module, whole: Collection[str], *, paired: bool) -> nn.Module:
    for name in mixers_of(layer):
        setattr(layer, name, _PassedOn(paired=paired))
    for name in whole:
        if name in layer._modules and not isinstance(layer._modules[name], _PassedOn):
            setattr(layer, name, _PassedOn(paired=True))
    return layer


def _shorten(config: PreTrainedConfig, count: int, kept: Sequence[int], *, shorter: bool) -> None:
    """Reduces a config's per-layer values to the kept layers, without its validation, because no model is built from it."""
    values = vars(config)
    names = getattr(config, "attribute_map", {})
    for key, value in list(values.items()):
        if isinstance(value, list | tuple) and len(value) == count:
            values[key] = type(value)(value[index] for index in kept)
    key = names.get("num_hidden_layers", "num_hidden_layers")
    if key in values and shorter:
        values[key] = len(kept)
    values["use_cache"] = False
    if "_attn_implementation_internal" in values:
        values["_attn_implementation_internal"] = "eager"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
