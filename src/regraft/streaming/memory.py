"""Memory that a streamed run needs, and the sizes of its batches and blocks.

The numbers are upper bounds, computed from the sizes of the model: the largest layer in float32, the memory for scoring or re-fitting
it, and the activations of the smallest batch. The rest of ``--memory`` is used for larger batches and for hidden states, which are
otherwise on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

from regraft.errors import InputError
from regraft.groups.experts import CHOSEN_KEYS
from regraft.importance.criteria import LooksAt
from regraft.models.view import ModelView
from regraft.streaming.passes import BATCH, Limits
from regraft.streaming.skeleton import Skeleton

# Upper limit for the interpreter and the libraries. Memory of the calling process beyond that is not counted against ``memory``.
MOST_PROGRAM_BYTES = 700_000_000
# Growth of the program while it runs: buffers of the allocator and of the matrix library, and pieces that are being written.
SPARE_BYTES = 150_000_000
HEAD_TOKENS = 64
F32, F64 = 4, 8


@dataclass(frozen=True)
class Task:
    """The work of a streamed run.

    Attributes:
        looks_at: The evidence that the criterion reads; None when nothing is scored.
        squares: Whether the criterion reads squared gradients.
        refits: Whether the projections that read pruned channels are re-fitted.
        windows: Number of calibration windows; 0 without text.
        tokens: Length of a window in tokens.
    """

    looks_at: LooksAt | None
    squares: bool
    refits: bool
    windows: int
    tokens: int


@dataclass(frozen=True)
class Room:
    """Memory plan of a streamed run.

    Attributes:
        limits: Sizes of batches and blocks.
        hidden_in_memory: Whether the hidden states of the windows are in memory; False when they are on disk.
        working_bytes: Memory of the run, without the program itself and the hidden states.
        hidden_bytes: Size of the hidden states.
        program_bytes: Memory of the program itself.
        bound_bytes: The limit that the user gave.
    """

    limits: Limits
    hidden_in_memory: bool
    working_bytes: int
    hidden_bytes: int
    program_bytes: int
    bound_bytes: int

    @property
    def fits(self) -> bool:
        """Returns whether the run and the program itself together are within the limit."""
        return self.working_bytes + self.program_bytes <= self.bound_bytes


def find_room(skeleton: Skeleton, task: Task, bound_bytes: int) -> Room:
    """Chooses the sizes of batches and blocks for a memory limit.

    Raises:
        InputError: The limit is below the need of one layer; the message gives that need.
    """
    sizes = _Sizes.of(skeleton)
    program = min(psutil.Process().memory_info().rss, MOST_PROGRAM_BYTES) + SPARE_BYTES
    parts = _parts(sizes, task)
    needed = sum(parts.values())
    if needed > bound_bytes:
        listed = ", ".join(f"{in_words(value)} for {what}" for what, value in parts.items() if value)
        raise InputError(
            f"`memory={in_words(bound_bytes)}` is below what one layer needs, {in_words(needed)}: {listed}; "
            f"use `memory={in_words(needed + program)}` or more (the program itself takes {in_words(program)})"
        )
    spare = max(0, bound_bytes - program - needed)
    backward = task.looks_at == "gradients"
    windows = 1
    if backward and not task.squares:
        more = min(BATCH, task.windows, 1 + spare // 2 // max(1, sizes.backward_bytes(task.tokens)))
        spare -= (more - 1) * sizes.backward_bytes(task.tokens)
        windows = more
    row = sizes.channels * (F32 + skeleton.dtype.itemsize) + 4 * F32 * HEAD_TOKENS
    limits = Limits(windows, max(1, min(sizes.vocabulary, (needed + spare) // 2 // row)), HEAD_TOKENS)
    slots = len(skeleton.view.layers) + 2 if backward else 1
    hidden = slots * task.windows * task.tokens * sizes.channels * F32
    return Room(limits, hidden <= spare, needed, hidden, program, bound_bytes)


@dataclass(frozen=True)
class MomentsRoom:
    """Memory plan of a streamed decomposition.

    Attributes:
        room: Sizes of batches and blocks, and what the run takes.
        part_bytes: Moments in memory at a time.
    """

    room: Room
    part_bytes: int


def find_room_for_moments(
    skeleton: Skeleton,
    shapes: Sequence[tuple[int, int]],
    looks_at: Literal["weights", "inputs", "gradients"],
    size: tuple[int, int],
    bound_bytes: int,
) -> MomentsRoom:
    """Chooses batches and blocks for moments of linear layers and their decompositions within a memory limit.

    Args:
        skeleton: The checkpoint.
        shapes: Outputs and inputs of the linear layers.
        looks_at: What is collected in addition to the weights.
        size: Number of calibration windows and their tokens; zeros without text.
        bound_bytes: The limit.

    Raises:
        InputError: The limit is below the need of one layer; the message gives that need.
    """
    sizes, backward, (windows, tokens) = _Sizes.of(skeleton), looks_at == "gradients", size
    program = min(psutil.Process().memory_info().rss, MOST_PROGRAM_BYTES) + SPARE_BYTES
    own = max(_moments_of(shape, looks_at) for shape in shapes)
    widest = max(map(max, shapes))
    activations = 0
    if windows:
        activations = sizes.backward_bytes(tokens) if backward else BATCH * tokens * sizes.features * F32
        activations += (1 if backward else BATCH) * tokens * widest * F64
    collecting = sizes.layer * F32 + activations
    # The weight in float32 and float64, seen through the metric of its smaller side, and what its eigenvectors take.
    decomposing = max(rows * columns * (F32 + 2 * F64) + max(rows * columns, 6 * min(rows, columns) ** 2) * F64 for rows, columns in shapes)
    outside = sizes.outside * F32
    needed = max(collecting, decomposing) + own + outside
    if needed > bound_bytes:
        raise InputError(
            f"`memory={in_words(bound_bytes)}` is below what one layer needs, {in_words(needed)}: {in_words(own)} for moments, "
            f"{in_words(max(collecting, decomposing))} for a layer in float32 or its decomposition; "
            f"use `memory={in_words(needed + program)}` or more (the program itself takes {in_words(program)})"
        )
    spare = max(0, bound_bytes - program - needed)
    slots = len(skeleton.view.layers) + 2 if backward else 1
    hidden = slots * windows * tokens * sizes.channels * F32
    inside = hidden <= spare // 2
    spare -= hidden if inside else 0
    row = sizes.channels * (F32 + skeleton.dtype.itemsize) + 3 * F64 * HEAD_TOKENS
    limits = Limits(1, max(1, min(sizes.vocabulary, (own + spare) // 2 // row)), HEAD_TOKENS)
    return MomentsRoom(Room(limits, inside, needed, hidden, program, bound_bytes), own + spare)


def _moments_of(shape: tuple[int, int], looks_at: Literal["weights", "inputs", "gradients"]) -> int:
    rows, columns = shape
    return {"weights": 0, "inputs": columns * columns, "gradients": columns * columns + rows * rows}[looks_at] * F64


def in_words(count_bytes: int) -> str:
    """Returns a number of bytes in the format of the setting ``memory``, rounded up.

    >>> in_words(1_234_567_890), in_words(45_000_001), in_words(1200), in_words(12)
    ('1.24GB', '46MB', '2KB', '12B')
    """
    if count_bytes < 1_000:
        return f"{count_bytes}B"
    if count_bytes >= 1_000_000_000:
        return f"{-(-count_bytes // 10_000_000) / 100:.2f}GB"
    unit, name = (1_000_000, "MB") if count_bytes >= 1_000_000 else (1_000, "KB")
    return f"{-(-count_bytes // unit)}{name}"


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model.

    Attributes:
        layer: Number of parameters of the largest layer.
        largest: Number of values of the largest tensor of a layer.
        readers: Input widths of the projections that read prunable channels, for the layer where they are largest.
        features: Sum of the inputs and outputs of all projections of a layer: floats of activations for one token.
        channels: Width of the residual stream.
        vocabulary: Number of rows of the output projection.
        outside: Number of parameters that are always in memory: norms and positions.
    """

    layer: int
    largest: int
    readers: tuple[int, ...]
    features: int
    channels: int
    vocabulary: int
    outside: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> _Sizes:
        view = skeleton.view
        layers = [[parameter.numel() for parameter in layer.parameters()] for layer in view.layers]
        outside = sum(
            parameter.numel()
            for name, parameter in view.model.named_parameters()
            if not name.startswith(f"{view.family.layers}.") and name not in (skeleton.embedding_name, skeleton.head_name)
        )
        rows, channels = skeleton.head_shape
        return cls(
            layer=max(map(sum, layers)),
            largest=max(max(numbers, default=0) for numbers in layers),
            readers=max((_readers(view, index) for index in range(len(layers))), key=lambda widths: sum(w * w for w in widths)),
            features=max(_features(view, index) for index in range(len(layers))) + 6 * channels,
            channels=channels,
            vocabulary=rows,
            outside=outside,
        )

    def forward_bytes(self, tokens: int) -> int:
        """Returns the activations of a forward pass of one batch, some of them in double precision for their moments."""
        return BATCH * tokens * (self.features * F32 + max(self.readers, default=0) * 2 * F64)

    def backward_bytes(self, tokens: int) -> int:
        """Returns the activations of a forward and backward pass of one window."""
        return tokens * self.features * 3 * F32


def _parts(sizes: _Sizes, task: Task) -> Mapping[str, int]:
    """Returns the memory of the most demanding phase, by purpose."""
    layer = sizes.layer * F32
    phases: list[dict[str, int]] = [{"a layer in float32": layer, "scoring it": 6 * sizes.largest * F32}]
    if task.windows:
        phases[0]["activations"] = sizes.forward_bytes(task.tokens)
    squared = sum(width * width for width in sizes.readers) * F64
    widest = max((width * width for width in sizes.readers), default=0) * F64
    projection = 2 * F64 * max(sizes.readers, default=0) * sizes.channels
    if task.looks_at == "gradients":
        several = 2 if task.squares else 1
        phases.append(
            {
                "a layer in float32": layer,
                "its gradients": several * layer,
                "scoring it": (7 if task.squares else 4) * sizes.largest * F32,
                "activations": sizes.backward_bytes(task.tokens),
            }
        )
    if task.looks_at == "moments":
        phases.append(
            {
                "a layer in float32": layer,
                "second moments": squared + 4 * widest + 2 * projection,
                "activations": sizes.forward_bytes(task.tokens),
            }
        )
    if task.refits:
        phases.append(
            {
                "a layer in float32": layer,
                "re-fitting its widest projection": 4 * widest + 2 * projection,
                "activations": sizes.forward_bytes(task.tokens),
            }
        )
    most = max(phases, key=lambda parts: sum(parts.values()))
    return most | {"norms and the like": sizes.outside * F32}


def _readers(view: ModelView, index: int) -> tuple[int, ...]:
    widths: list[int] = []
    for coupling in view.family.couplings:
        for axis in coupling.axes:
            module = view.module(index, axis.module)
            if axis.side == "in" and module is not None:
                widths.append(module.get_parameter("weight").shape[0 if view.family.transposed else 1])
    return tuple(widths)


def _features(view: ModelView, index: int) -> int:
    modules = [view.module(index, name) for name in view.linear_names()]
    return sum(sum(module.get_parameter("weight").shape) for module in modules if module is not None) + _of_experts(view, index)


def _of_experts(view: ModelView, index: int) -> int:
    """Returns the floats of activations for one token in its experts: the channels and outputs of all stacks, for each that is chosen."""
    stacks = [parameter.shape for parameter in view.layers[index].parameters() if parameter.dim() == 3]
    values = view.model.config.to_dict()
    return next((int(values[key]) for key in CHOSEN_KEYS if values.get(key)), 0) * sum(sum(shape[1:]) for shape in stacks)
