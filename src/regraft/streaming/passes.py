"""Passes over a checkpoint, one layer at a time, for criteria and re-fitting without the model in memory.

The exact gradient of the language-modelling loss takes three passes over the file. The first goes forward through the layers and stores
the input of each layer. The second goes through the output projection in blocks of rows, for the loss and its gradient. The third goes
backward: each layer is computed again with autograd and passes the gradient of its input down. Nothing is approximated: it is gradient
checkpointing with the weights on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regraft.errors import ModelError
from regraft.importance.passes import Gradients, Passes, refuse_single_tokens
from regraft.models.layerwise import Layerwise, Walk, emptied, stopped_at
from regraft.models.precision import round_weights
from regraft.models.view import ModelView
from regraft.plans import Group, Groups
from regraft.progress import Say, Step, say_nothing
from regraft.streaming.head import loss_gradient
from regraft.streaming.hidden import HiddenStates
from regraft.streaming.skeleton import Skeleton

# Windows of one forward pass. It is the same as in memory, because re-fitting evaluates on the last window of each batch.
BATCH = 8


@dataclass(frozen=True)
class Limits:
    """Sizes of the batches and blocks of a pass.

    Attributes:
        backward_windows: Number of windows in one backward pass.
        head_rows: Number of rows of the output projection in memory at a time.
        head_tokens: Number of tokens whose logits are computed at a time.
    """

    backward_windows: int
    head_rows: int
    head_tokens: int


class StreamedPasses(Passes):
    """Evidence for criteria, computed layer by layer from a file.

    Args:
        skeleton: The checkpoint.
        windows_NT: Calibration tokens, int64 (windows, tokens), or None when only weights are needed.
        hidden: Opens a storage for the hidden states of one walk.
        limits: Sizes of batches and blocks.
        say: Called with one line for each layer.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows_NT: Tensor | None,
        hidden: Callable[[], HiddenStates],
        limits: Limits,
        say: Say = say_nothing,
    ) -> None:
        self._skeleton = skeleton
        self._windows = windows_NT
        self._hidden = hidden
        self._limits = limits
        self._say = say

    def weights(self, groups: Groups) -> Iterator[tuple[Group, ...]]:
        """Yields the groups of one layer after another, with the layer's weights in memory."""
        for layer, here in self._by_layer(groups):
            with self._skeleton.layer(layer):
                self._say(Step("scoring layers", layer + 1, groups.layers))
                yield here

    def walk(self) -> StreamedWalk:
        """Returns a walk that reads each layer when it reaches it."""
        assert self._windows is not None
        return StreamedWalk(self._skeleton, self._windows, self._hidden, self._say)

    def gradients(self, groups: Groups, *, squares: bool) -> Iterator[Gradients]:
        """Yields the gradients layer by layer, from the last to the first.

        Raises:
            InputError: The windows have a single token, so that there is nothing to predict.
        """
        assert self._windows is not None
        refuse_single_tokens(self._windows)
        layers = groups.layers
        with self._hidden() as hidden:
            walk = StreamedWalk(self._skeleton, self._windows, lambda: hidden, self._say, keep=True)
            for layer in walk.layers():
                walk.advance(layer)
            self._say("computing the gradient of the loss")
            head = self._limits.head_rows, self._limits.head_tokens
            loss_gradient(self._skeleton, self._windows, hidden, layers, *head)
            backward = _Backward(self._skeleton, self._windows, hidden, layers, self._limits.backward_windows)
            for layer, here in reversed(list(self._by_layer(groups))):
                with self._skeleton.layer(layer) as module:
                    self._say(Step("going back through layers", layers - layer, layers))
                    names = {member.parameter for group in here for member in group.members}
                    first, second = backward.through(layer, module, names, squares=squares)
                    yield Gradients(here, first, second)
                    del first, second

    def _by_layer(self, groups: Groups) -> Iterator[tuple[int, tuple[Group, ...]]]:
        for layer in range(groups.layers):
            yield layer, tuple(group for group in groups.groups if group.layer == layer)


class StreamedWalk(Walk):
    """A walk through the layers of a checkpoint.

    Args:
        skeleton: The checkpoint.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        hidden: Opens a storage for the hidden states.
        say: Called with one line for each layer.
        finished: Loads the re-fitted weights of an interrupted run into a layer, given its index and module. None when there are none.
        start: Number of layers, from the first on, that were re-fitted in an interrupted run.
        gone: Removed layers, which are skipped, and removed parts of layers, whose output is zero.
        keep: Whether the input of layer ``i`` is kept in slot ``i`` of ``hidden`` and the last layer's output in the slot after it, with
            ``hidden`` left open. Otherwise a single slot is overwritten.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows_NT: Tensor,
        hidden: Callable[[], HiddenStates],
        say: Say = say_nothing,
        *,
        finished: Callable[[int, nn.Module], None] | None = None,
        start: int = 0,
        gone: Sequence[Group] = (),
        keep: bool = False,
    ) -> None:
        self.view: ModelView = skeleton.view
        self._skeleton = skeleton
        self._windows = windows_NT
        self._open = hidden
        self._say = say
        self._finished = finished
        self._start = start
        self._passed = {group.layer for group in gone if group.kind == "layer"}
        self._silent = [group for group in gone if group.kind != "layer"]
        self._keep = keep
        self._calls = Calls(skeleton, windows_NT)

    def layers(self) -> Iterator[int]:
        """Yields the index of each layer that is not finished, in order, once the layer is in memory."""
        count = len(self.view.layers)
        self._hidden = self._open()
        try:
            for first, ids in self._batches():
                self._hidden.put(0, first, self._calls.embedded(ids))
            for layer in range(count):
                if layer in self._passed:
                    continue
                with self._skeleton.layer(layer) as module, ExitStack() as silence:
                    self._say(Step("reading layers", layer + 1, count))
                    for group in self._silent:
                        if group.layer == layer:
                            silence.enter_context(emptied(self.view, group))
                    if self._finished is not None and layer < self._start:
                        self._finished(layer, module)
                        self.advance(layer, module)
                    else:
                        yield layer
        finally:
            if not self._keep:
                self._hidden.close()

    def changeable(self, layer: int) -> nn.Module:
        """Returns the layer itself, because it leaves memory after this step."""
        return self.view.layers[layer]

    def look(self, layer: int, module: nn.Module | None = None, until: nn.Module | None = None) -> None:
        """Runs the windows through a layer as far as ``until`` and discards the output."""
        if module is not None:
            round_weights(module, self._skeleton.dtype)
        for first, ids in self._batches():
            with stopped_at(until):
                self._through(layer, module, first, len(ids))

    def advance(self, layer: int, module: nn.Module | None = None) -> None:
        """Runs the windows through a layer and stores the output."""
        if module is not None:
            round_weights(module, self._skeleton.dtype)  # so that later layers see the saved values
        for first, ids in self._batches():
            self._hidden.put(layer + 1 if self._keep else 0, first, self._through(layer, module, first, len(ids)))

    @torch.no_grad()
    def _through(self, layer: int, module: nn.Module | None, first: int, count: int) -> Tensor:
        entering = self._hidden.get(layer if self._keep else 0, first, count).to(self._skeleton.device)
        return self._calls.through(layer, entering, module)

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self._windows), BATCH):
            yield first, self._windows[first : first + BATCH]


class Calls:
    """Calls of single layers, with the masks, positions and other arguments that the model itself passes.

    Args:
        skeleton: The checkpoint.
        windows_NT: Calibration tokens; the other arguments depend only on the number and the length of the windows.

    Raises:
        ModelError: Layers read more than that: the tokens themselves, keys and values of other layers, or several streams side by side.
    """

    def __init__(self, skeleton: Skeleton, windows_NT: Tensor) -> None:
        self._skeleton = skeleton
        self._windows = windows_NT
        self._known: dict[int, Layerwise] = {}
        refuse_further_inputs(skeleton.view, windows_NT)

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Returns the input of the first layer, (batch, tokens, channels)."""
        walk = Layerwise(self._skeleton.view, ids_BT, batch=len(ids_BT))
        entering = walk.first.pop()
        self._known.setdefault(len(ids_BT), walk)
        return entering

    def through(self, layer: int, hidden_BTD: Tensor, module: nn.Module | None = None) -> Tensor:
        """Returns the output of a layer, with autograd if it is enabled."""
        count = hidden_BTD.shape[0]
        if count not in self._known:
            self.embedded(self._windows[:count])
        return self._known[count].call(layer, hidden_BTD, module)


def refuse_further_inputs(view: ModelView, windows_NT: Tensor) -> None:
    """Refuses layers that read more than the hidden states of one stream.

    Args:
        view: The model; its layers need no weights.
        windows_NT: Calibration tokens.

    Raises:
        ModelError: Layers read the tokens, or keys and values of other layers, or several streams side by side.
    """
    ids = windows_NT[:1]
    first, other = (Layerwise(view, tokens) for tokens in (ids, torch.where(ids > 0, ids - 1, ids + 1)))
    if first.first[0].dim() != 3 or not first.arguments[0].alike(other.arguments[0]):
        raise ModelError(
            f"layers of '{view.family.model_type}' read more than the hidden states of one stream (embeddings for each layer, keys and "
            "values of other layers), which `memory` does not hold with a calibration text; leave `memory` out, or use `criterion=l2`, "
            "which needs no text"
        )


class _Backward:
    """Backward pass through one layer at a time: from the gradient of its output to those of its input and weights."""

    def __init__(self, skeleton: Skeleton, windows_NT: Tensor, hidden: HiddenStates, layers: int, windows: int) -> None:
        self._calls = Calls(skeleton, windows_NT)
        self._device = skeleton.device
        self._view = skeleton.view
        self._count = len(windows_NT)
        self._hidden = hidden
        self._slot = layers + 1
        self._windows = windows

    def through(self, layer: int, module: nn.Module, names: set[str], *, squares: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the mean gradients of the named parameters of a layer, and with ``squares`` their mean squares over windows."""
        prefix = self._view.layer_name(layer)
        wanted = {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters() if f"{prefix}.{name}" in names}
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        found = self._with_squares(layer, wanted) if squares else (self._means(layer, wanted), {})
        self._hidden.drop(layer)
        return found

    def _means(self, layer: int, wanted: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Returns mean gradients, computed from several windows at once."""
        for first in range(0, self._count, self._windows):
            self._back(layer, list(wanted.values()), first, min(self._windows, self._count - first))
        means = {name: _gradient(parameter).div_(self._count) for name, parameter in wanted.items()}
        for parameter in wanted.values():
            parameter.grad = None
        return means

    def _with_squares(self, layer: int, wanted: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns mean gradients and mean squared gradients, window by window, without storing all gradients of a window at once."""
        first = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in wanted.items()}
        second = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in wanted.items()}
        handles = [
            parameter.register_post_accumulate_grad_hook(_squarer(first[name], second[name], self._count))
            for name, parameter in wanted.items()
        ]
        try:
            for window in range(self._count):
                self._back(layer, list(wanted.values()), window, 1)
        finally:
            for handle in handles:
                handle.remove()
        return first, second

    def _back(self, layer: int, parameters: list[nn.Parameter], first: int, count: int) -> None:
        """Runs the backward pass of a layer for some windows and adds to the gradients of its parameters."""
        entering = self._hidden.get(layer, first, count).to(self._device).detach().requires_grad_(True)
        above = self._hidden.get(self._slot, first, count).to(self._device)
        with torch.enable_grad():
            leaving = self._calls.through(layer, entering)
        torch.autograd.backward([leaving], [above], inputs=[entering, *parameters])
        self._hidden.put(self._slot, first, _gradient(entering))


def _squarer(first: Tensor, second: Tensor, count: int) -> Callable[[Tensor], None]:
    """Returns a hook that adds a window's gradient and its square to the means, and frees the gradient at once."""

    def take(parameter: Tensor) -> None:
        gradient = _gradient(parameter)
        first.add_(gradient, alpha=1.0 / count)
        second.addcmul_(gradient, gradient, value=1.0 / count)
        parameter.grad = None

    return take


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
