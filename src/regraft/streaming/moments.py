"""Moments of the inputs and output gradients of a checkpoint's linear layers, one decoder layer in memory at a time.

They are those of :func:`regraft.compression.gather` up to rounding. Inputs take one pass through the layers. Gradients take three, as for
criteria (:mod:`regraft.streaming.passes`): forward with the input of each layer kept, the output projection in blocks, and backward, where
a layer is computed again and gives its inputs and gradients in one. A layer whose moments do not fit at once is computed several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regraft.compression.contract import Evidence, LooksAt
from regraft.compression.gather import Watcher, grouped_batches, in_parts, uniforms
from regraft.progress import Say, Step, say_nothing
from regraft.streaming.head import drawn_gradient
from regraft.streaming.hidden import HiddenStates
from regraft.streaming.memory import MomentsRoom
from regraft.streaming.passes import Calls
from regraft.streaming.skeleton import Skeleton


@dataclass(frozen=True)
class _Batch:
    """Some windows of one group: the number of the group, of the batch in memory, of the first window, and how many there are."""

    group: int
    number: int
    first: int
    count: int


def streamed_moments(
    skeleton: Skeleton,
    names: Sequence[str],
    windows_NT: Tensor | None,
    looks_at: LooksAt,
    hidden: Callable[[], HiddenStates],
    room: MomentsRoom,
    *,
    seed: int = 0,
    say: Say = say_nothing,
) -> Iterator[Evidence]:
    """Yields the evidence of linear layers; with gradients those of the last decoder layer come first.

    Args:
        skeleton: The checkpoint.
        names: Full names of the layers, in the order of the model.
        windows_NT: Calibration tokens, int64 (windows, tokens); None where weights alone are looked at.
        looks_at: Evidence that is needed in addition to the weights.
        hidden: Opens a storage for hidden states.
        room: Sizes of batches and blocks, and of the moments in memory at a time.
        seed: Seed for the tokens drawn from the model's predictions.
        say: Called with a line of progress for each decoder layer.

    Raises:
        InputError: Inputs or gradients hold NaN or infinity; the message names the layer and the batch.
    """
    if looks_at == "weights":
        yield from (Evidence(name, weight_of(skeleton, name)) for name in names)
        return
    assert windows_NT is not None
    passes = _MomentPasses(skeleton, names, windows_NT, room, say)
    with hidden() as states:
        if looks_at == "inputs":
            yield from passes.forward(states)
        else:
            yield from passes.backward(states, uniforms(windows_NT, seed))


def weight_of(skeleton: Skeleton, name: str) -> Tensor:
    """Returns the weight of a linear layer, float32 (out, in)."""
    weight = skeleton.values(f"{name}.weight")
    return weight.T if skeleton.view.family.transposed else weight


class _MomentPasses:
    def __init__(self, skeleton: Skeleton, names: Sequence[str], windows_NT: Tensor, room: MomentsRoom, say: Say) -> None:
        self._skeleton = skeleton
        self._windows = windows_NT
        self._room = room
        self._say = say
        self._calls = Calls(skeleton, windows_NT)
        self._layers = len(skeleton.view.layers)
        self._batches: list[_Batch] = []
        first = 0
        for number, (group, ids) in enumerate(grouped_batches(windows_NT), 1):
            self._batches.append(_Batch(group, number, first, len(ids)))
            first += len(ids)
        self._here: list[dict[str, nn.Module]] = []
        for layer in range(self._layers):
            prefix = f"{skeleton.view.layer_name(layer)}."
            module = skeleton.view.layers[layer]
            self._here.append({name: module.get_submodule(name.removeprefix(prefix)) for name in names if name.startswith(prefix)})

    def forward(self, states: HiddenStates) -> Iterator[Evidence]:
        """Yields moments of inputs, layer by layer."""
        self._embed(states)
        for layer in range(self._layers):
            self._say(Step("reading layers", layer + 1, self._layers))
            parts = self._parts(layer, "inputs")
            for index, part in enumerate(parts):
                with self._skeleton.layer(layer), self._watcher(part, with_gradients=False) as watcher, torch.no_grad():
                    for batch in self._batches:
                        leaving = self._calls.through(layer, self._entering(states, 0, batch))
                        if part:
                            watcher.add_inputs(batch.group, batch.number)
                        if index == len(parts) - 1:
                            states.put(0, batch.first, leaving)
                yield from (watcher.evidence(name, weight_of(self._skeleton, name)) for name in part)

    def backward(self, states: HiddenStates, uniforms_NT: Tensor) -> Iterator[Evidence]:
        """Yields moments of inputs and gradients, from the last layer to the first."""
        self._embed(states)
        for layer in range(self._layers):
            self._say(Step("reading layers", layer + 1, self._layers))
            with self._skeleton.layer(layer), torch.no_grad():
                for batch in self._batches:
                    states.put(layer + 1, batch.first, self._calls.through(layer, self._entering(states, layer, batch)))
        self._say("drawing tokens from the predictions")
        limits = self._room.room.limits
        drawn_gradient(self._skeleton, uniforms_NT, states, self._layers, limits.head_rows, limits.head_tokens)
        for layer in reversed(range(self._layers)):
            self._say(Step("going back through layers", self._layers - layer, self._layers))
            parts = self._parts(layer, "gradients")
            for index, part in enumerate(parts):
                with self._skeleton.layer(layer), self._watcher(part, with_gradients=True) as watcher, torch.enable_grad():
                    for batch in self._smaller(limits.backward_windows):
                        self._back(layer, batch, watcher, states, last=index == len(parts) - 1)
                yield from (watcher.evidence(name, weight_of(self._skeleton, name)) for name in part)
            states.drop(layer)

    def _back(self, layer: int, batch: _Batch, watcher: Watcher, states: HiddenStates, *, last: bool) -> None:
        """Adds the gradients of a batch; the last time that a layer is computed, that of its input is kept for the layer below."""
        entering = self._entering(states, layer, batch).detach().requires_grad_(True)
        above = self._entering(states, self._layers + 1, batch)
        leaving = self._calls.through(layer, entering)
        outputs = watcher.outputs
        found = torch.autograd.grad(leaving, [*outputs, entering], above)
        if outputs:
            watcher.add_inputs(batch.group, batch.number)
            watcher.add_gradients(found[:-1], batch.number)
        if last:
            states.put(self._layers + 1, batch.first, found[-1])

    def _embed(self, states: HiddenStates) -> None:
        for batch in self._batches:
            states.put(0, batch.first, self._calls.embedded(self._windows[batch.first : batch.first + batch.count]))

    def _entering(self, states: HiddenStates, slot: int, batch: _Batch) -> Tensor:
        return states.get(slot, batch.first, batch.count).to(self._skeleton.device)

    def _watcher(self, part: Mapping[str, nn.Module], *, with_gradients: bool) -> Watcher:
        return Watcher(part, 1 + self._batches[-1].group, with_gradients=with_gradients)

    def _parts(self, layer: int, looks_at: LooksAt) -> list[dict[str, nn.Module]]:
        """Returns the layer's projections in parts whose moments fit; one empty part where it has none of interest."""
        transposed = self._skeleton.view.family.transposed
        return list(in_parts(self._here[layer], looks_at, transposed, self._room.part_bytes)) or [{}]

    def _smaller(self, windows: int) -> Iterator[_Batch]:
        """Yields the batches, cut into pieces of at most so many windows."""
        for batch in self._batches:
            for start in range(0, batch.count, windows):
                yield _Batch(batch.group, batch.number, batch.first + start, min(windows, batch.count - start))
