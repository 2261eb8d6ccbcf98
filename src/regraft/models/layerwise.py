"""Execution of a decoder one layer at a time, on calibration windows.

Layer-by-layer methods need only the inputs of one layer. The other arguments of each layer (causal mask, rotary embedding, positions) are
recorded once from the model's own forward pass, so that nothing here depends on a family.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from regraft.models.precision import round_weights
from regraft.models.trainable import replaced_forwards
from regraft.models.view import ModelView
from regraft.plans import Group


@dataclass(frozen=True)
class Arguments:
    """What the model passes to each layer beside the hidden states, in one forward pass.

    Attributes:
        positional: Positional arguments after the hidden states, for each layer.
        named: Named arguments, for each layer.
    """

    positional: tuple[tuple[Any, ...], ...]
    named: tuple[dict[str, Any], ...]

    def sharing(self, known: Arguments) -> Arguments:
        """Returns these arguments with the tensors of others in place of equal ones, so that they are in memory once."""
        mine, form = tree_flatten((self.positional, self.named))
        others, form_there = tree_flatten((known.positional, known.named))
        if form != form_there:
            return self
        return Arguments(*tree_unflatten([two if _equal(one, two) else one for one, two in zip(mine, others, strict=True)], form))

    def alike(self, other: Arguments) -> bool:
        """Returns whether all tensors are equal, and no argument is a store that layers write into."""
        pairs = zip(tree_leaves((self.positional, self.named)), tree_leaves((other.positional, other.named)), strict=True)
        same = all(_equal(one, two) for one, two in pairs if isinstance(one, Tensor) or isinstance(two, Tensor))
        return same and not any(self.stores(layer) for layer in range(len(self.named)))

    def stores(self, layer: int) -> list[UserDict[Any, Any]]:
        """Returns the stores that a layer may write into, for layers after it: keys and values that layers share."""
        return [value for value in (*self.positional[layer], *self.named[layer].values()) if isinstance(value, UserDict)]


def _equal(one: Any, other: Any) -> bool:
    """Returns whether two values are the same, or tensors of equal values."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype and one.device == other.device
    return one is other or (both and torch.equal(one, other))


class Layerwise:
    """The layers of a model, each called with the same arguments as in the model's forward pass.

    Layers of some families read the tokens beside the hidden states (per-layer embeddings), or keys and values of layers before them. Each
    batch therefore has its own arguments; those that are equal are kept once.

    Args:
        view: The model; it is read, never changed, and has to be in evaluation mode.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        batch: Number of windows in one forward pass.
    """

    def __init__(self, view: ModelView, windows_NT: Tensor, batch: int = 8) -> None:
        self.view = view
        self.batches: list[Tensor] = list(windows_NT.split(batch))
        self.arguments: list[Arguments] = []
        self.first: list[Tensor] = []
        self._reached: dict[int, int] = {}
        self._shared: dict[tuple[int, int], list[dict[Any, Any]]] = {}
        for ids in self.batches:
            hidden, arguments = _record(view, ids)
            self.first.append(hidden)
            self.arguments.append(arguments.sharing(self.arguments[0]) if self.arguments else arguments)

    @torch.no_grad()
    def run(self, layer: int, hidden: list[Tensor], module: nn.Module | None = None) -> list[Tensor]:
        """Returns the outputs of one layer, a tensor (batch, tokens, hidden) for each batch.

        Args:
            layer: Index of the layer.
            hidden: Inputs of the layer, a tensor for each batch.
            module: A module to run in the layer's place, such as a changed copy.
        """
        return [self.call(layer, part, module, index) for index, part in enumerate(hidden)]

    def call(self, layer: int, hidden_BTD: Tensor, module: nn.Module | None = None, batch: int = 0) -> Tensor:
        """Returns the output of one layer for one batch, with autograd if it is enabled.

        Args:
            layer: Index of the layer.
            hidden_BTD: Input of the layer.
            module: A module to run in the layer's place.
            batch: Index of the batch that the input belongs to.
        """
        arguments = self.arguments[batch]
        self._restore(arguments, layer, batch)
        output = (module or self.view.layers[layer])(hidden_BTD, *arguments.positional[layer], **arguments.named[layer])
        self._reached[batch] = layer
        return output[0] if isinstance(output, tuple) else output

    def _restore(self, arguments: Arguments, layer: int, batch: int) -> None:
        """Gives a layer the keys and values of the run that it continues, or those that it had when it was first reached."""
        stores = arguments.stores(layer)
        if self._reached.get(batch) != layer - 1:  # not the next layer of the last run
            for store, before in zip(stores, self._shared.get((layer, batch), ()), strict=False):
                store.data = dict(before)
        self._shared.setdefault((layer, batch), [dict(store) for store in stores])

    @torch.no_grad()
    def logits(self, hidden: list[Tensor]) -> Iterator[Tensor]:
        """Yields the logits (batch, tokens, vocabulary) of the last layer's outputs, batch by batch."""
        for ids, batch in zip(self.batches, hidden, strict=True):
            with layers_give(self.view, batch):
                yield self.view.model(input_ids=ids.to(batch.device), use_cache=False).logits


class Walk(ABC):
    """One pass of calibration windows through the layers of a model, from the first to the last.

    It hides the storage of weights and hidden states: a layer is only guaranteed to have its weights until :meth:`layers` yields the next.

    Attributes:
        view: The model.
        roomy: Whether activations of one layer on all windows may be kept in memory.
    """

    view: ModelView
    roomy: bool = False

    @abstractmethod
    def layers(self) -> Iterator[int]:
        """Yields the index of every layer in order."""

    @abstractmethod
    def changeable(self, layer: int) -> nn.Module:
        """Returns the layer or a copy of it whose weights may be changed; the walk continues with the changed weights."""

    @abstractmethod
    def look(self, layer: int, module: nn.Module | None = None, until: nn.Module | None = None) -> None:
        """Runs the windows through a layer, or through ``module`` in its place, for the hooks on it; the output is not kept.

        Args:
            layer: Index of the layer.
            module: Module to run in place of the layer.
            until: A module inside the layer; computation after this module may be omitted.
        """

    @abstractmethod
    def advance(self, layer: int, module: nn.Module | None = None) -> None:
        """Runs the windows through a layer, or through ``module`` in its place, and keeps the output for the next layer."""


class WholeWalk(Walk):
    """A walk through a model in memory.

    Args:
        view: The model; it is read, never changed, and has to be in evaluation mode.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        stored: Dtype to which changed weights are rounded before they are used; None for no rounding.
    """

    roomy = True

    def __init__(self, view: ModelView, windows_NT: Tensor, stored: torch.dtype | None = None) -> None:
        self.view = view
        self._stored = stored
        self._layerwise = Layerwise(view, windows_NT)
        self._hidden = self._layerwise.first

    def layers(self) -> Iterator[int]:
        """Yields the index of every layer in order."""
        yield from range(len(self.view.layers))

    def changeable(self, layer: int) -> nn.Module:
        """Returns a copy of the layer."""
        return copy.deepcopy(self.view.layers[layer])

    @torch.no_grad()
    def look(self, layer: int, module: nn.Module | None = None, until: nn.Module | None = None) -> None:
        """Runs the windows through a layer as far as ``until``, and discards the output."""
        self._round(module)
        for index, batch in enumerate(self._hidden):
            with stopped_at(until):
                self._layerwise.call(layer, batch, module, index)

    def advance(self, layer: int, module: nn.Module | None = None) -> None:
        """Runs the windows through a layer and keeps the output."""
        self._round(module)
        self._hidden = self._layerwise.run(layer, self._hidden, module)

    def _round(self, module: nn.Module | None) -> None:
        if module is not None and self._stored is not None:
            round_weights(module, self._stored)


def _record(view: ModelView, ids: Tensor) -> tuple[Tensor, Arguments]:
    """Runs the model with layers that only record; returns the embedded tokens and the other arguments of each layer."""
    notes: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []

    def note(*positional: Any, **named: Any) -> Any:
        hidden = positional[0] if positional else named.pop("hidden_states")
        entering.append(hidden)
        notes.append((positional[1:], named))
        return _as_returned(view, hidden)

    with replaced_forwards(dict.fromkeys(view.layers, note)), torch.no_grad():
        view.model(input_ids=ids.to(view.model.device), use_cache=False, logits_to_keep=1)
    positional, named = zip(*notes, strict=True)
    return entering[0], Arguments(positional, named)


def silenced(view: ModelView, group: Group) -> nn.Module:
    """Returns a copy of a layer with zeros in all parameters of one part, so that the part adds nothing to the stream."""
    assert group.layer is not None
    module = copy.deepcopy(view.layers[group.layer])
    prefix = f"{view.layer_name(group.layer)}."
    with torch.no_grad():
        for member in group.members:
            module.get_parameter(member.parameter.removeprefix(prefix)).zero_()
    return module


@contextmanager
def emptied(view: ModelView, group: Group) -> Iterator[None]:
    """Sets all parameters of a group to zero inside the block, in the layer itself and without additional memory."""
    parameters = [view.model.get_parameter(member.parameter) for member in group.members]
    before = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


class _Enough(Exception):
    """Ends a forward pass at the module where it is to stop."""


@contextmanager
def stopped_at(module: nn.Module | None) -> Iterator[None]:
    """Ends a forward pass inside the block after a module, and after earlier hooks on it; None never ends it."""

    def stop(_module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        raise _Enough

    handle = None if module is None else module.register_forward_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def watched_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``see(name, input)`` with the input of each module on every forward pass inside the block."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, inputs: see(name, inputs[0].detach())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layers_give(view: ModelView, hidden: Tensor) -> Iterator[None]:
    """Makes every layer return the same hidden states inside the block, so that only the modules after the layers are computed."""
    with replaced_forwards(dict.fromkeys(view.layers, lambda *positional, **named: _as_returned(view, hidden))):
        yield


def _as_returned(view: ModelView, hidden: Tensor) -> Any:
    """Returns hidden states in the form that the family's layers return."""
    return (hidden,) if view.family.layer_output == "tuple" else hidden
