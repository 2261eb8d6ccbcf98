"""Run a decoder one layer at a time on calibration windows.

Layer-by-layer methods need the inputs of one layer and nothing else. What a model hands to its layers beside the hidden states
(the causal mask, the rotary embedding, positions) is recorded once for every layer, from the model's own forward pass, so that
nothing here knows a family.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.models.precision import round_weights
from regraft.models.view import ModelView
from regraft.plans import Group


class Layerwise:
    """The layers of a model, each called with what the model would call it with.

    Args:
        view: The model; it is read, never changed, and has to be in evaluation mode.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        batch: Windows of one forward pass.
    """

    def __init__(self, view: ModelView, windows_NT: Tensor, batch: int = 8) -> None:
        self.view = view
        self.batches: list[Tensor] = list(windows_NT.split(batch))
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self.first: list[Tensor] = []
        for ids in self.batches:
            rows = ids.shape[0]
            hidden, arguments = _record(view, ids)
            self.first.append(hidden)
            # The arguments depend on the shape of a batch alone.
            self._arguments.setdefault(rows, arguments)

    @torch.no_grad()
    def run(self, layer: int, hidden: list[Tensor], module: nn.Module | None = None) -> list[Tensor]:
        """Returns the outputs of one layer, a tensor (batch, tokens, hidden) for each batch.

        Args:
            layer: Its index.
            hidden: Its inputs, a tensor for each batch.
            module: What to run in its place, such as a changed copy.
        """
        return [self.call(layer, batch, module) for batch in hidden]

    def call(self, layer: int, hidden_BTD: Tensor, module: nn.Module | None = None) -> Tensor:
        """Returns the output of one layer for one batch; gradients flow where they are on."""
        positional, named = self._arguments[hidden_BTD.shape[0]][layer]
        output = (module or self.view.layers[layer])(hidden_BTD, *positional, **named)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, hidden: list[Tensor]) -> Iterator[Tensor]:
        """Yields the logits (batch, tokens, vocabulary) of the last layer's outputs, batch by batch."""
        for ids, batch in zip(self.batches, hidden, strict=True):
            with layers_give(self.view, batch):
                yield self.view.model(input_ids=ids.to(batch.device), use_cache=False).logits


class Walk(ABC):
    """Calibration windows on their way through the layers of a model, from the first to the last, once.

    It hides where the weights and the hidden states are: a layer is only sure to have its weights while it is the one that
    :meth:`layers` has yielded last.
    """

    view: ModelView

    @abstractmethod
    def layers(self) -> Iterator[int]:
        """Yields the index of every layer in turn."""

    @abstractmethod
    def changeable(self, layer: int) -> nn.Module:
        """Returns the layer, or a copy of it, for its weights to be changed: this walk goes on through what was changed."""

    @abstractmethod
    def look(self, layer: int, module: nn.Module | None = None, until: nn.Module | None = None) -> None:
        """Sends the windows through a layer, or through ``module`` in its place, for the sake of those who watch it.

        Args:
            layer: Its index.
            module: What to run in its place.
            until: A module inside it; what comes from this one on may be left out.
        """

    @abstractmethod
    def advance(self, layer: int, module: nn.Module | None = None) -> None:
        """Sends the windows through a layer, or through ``module`` in its place, and on to the next."""


class WholeWalk(Walk):
    """A walk through a model that is in memory.

    Args:
        view: The model; it is read, never changed, and has to be in evaluation mode.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        stored: Type that changed weights are rounded to before anything is sent through them; None: they are left as they are.
    """

    def __init__(self, view: ModelView, windows_NT: Tensor, stored: torch.dtype | None = None) -> None:
        self.view = view
        self._stored = stored
        self._layerwise = Layerwise(view, windows_NT)
        self._hidden = self._layerwise.first

    def layers(self) -> Iterator[int]:
        """Yields the index of every layer in turn."""
        yield from range(len(self.view.layers))

    def changeable(self, layer: int) -> nn.Module:
        """Returns a copy of the layer."""
        return copy.deepcopy(self.view.layers[layer])

    @torch.no_grad()
    def look(self, layer: int, module: nn.Module | None = None, until: nn.Module | None = None) -> None:
        """Sends the windows through a layer as far as ``until``, and forgets what comes out."""
        self._round(module)
        for batch in self._hidden:
            with stopped_at(until):
                self._layerwise.call(layer, batch, module)

    def advance(self, layer: int, module: nn.Module | None = None) -> None:
        """Sends the windows through a layer and keeps what comes out."""
        self._round(module)
        self._hidden = self._layerwise.run(layer, self._hidden, module)

    def _round(self, module: nn.Module | None) -> None:
        if module is not None and self._stored is not None:
            round_weights(module, self._stored)


def _record(view: ModelView, ids: Tensor) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Runs the model with layers that only take notes; returns the embedded tokens and what each layer was given beside them."""
    notes: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []

    def note(*positional: Any, **named: Any) -> Any:
        hidden = positional[0] if positional else named.pop("hidden_states")
        entering.append(hidden)
        notes.append((positional[1:], named))
        return _as_returned(view, hidden)

    with _replaced_forward(view, note), torch.no_grad():
        view.model(input_ids=ids.to(view.model.device), use_cache=False, logits_to_keep=1)
    return entering[0], notes


def silenced(view: ModelView, group: Group) -> nn.Module:
    """Returns a copy of a layer in which everything that a part of it owns is zero, so that the part adds nothing to the stream."""
    assert group.layer is not None
    module = copy.deepcopy(view.layers[group.layer])
    prefix = f"{view.layer_name(group.layer)}."
    with torch.no_grad():
        for member in group.members:
            module.get_parameter(member.parameter.removeprefix(prefix)).zero_()
    return module


@contextmanager
def emptied(view: ModelView, group: Group) -> Iterator[None]:
    """Makes everything that a group owns zero inside the block, in the layer itself and in no memory of its own."""
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
    """Ends a pass that has come as far as it was to go."""


@contextmanager
def stopped_at(module: nn.Module | None) -> Iterator[None]:
    """Ends the pass inside the block where it comes to a module, after those who watch its inputs; None: nowhere."""

    def stop(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        raise _Enough

    handle = None if module is None else module.register_forward_pre_hook(stop)
    try:
        yield
    except _Enough:
        pass
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def watched_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Shows the input of each module to ``see(name, input)`` on every forward pass inside the block."""

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
    """Makes every layer return the same hidden states, so that only what follows the layers is computed."""
    with _replaced_forward(view, lambda *positional, **named: _as_returned(view, hidden)):
        yield


def _as_returned(view: ModelView, hidden: Tensor) -> Any:
    """Returns hidden states in the form in which the family's layers return them."""
    return (hidden,) if view.family.layer_output == "tuple" else hidden


@contextmanager
def _replaced_forward(view: ModelView, forward: Any) -> Iterator[None]:
    """Replaces the forward pass of every layer and puts it back."""
    layers: list[nn.Module] = list(view.layers)
    try:
        for layer in layers:
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
