"""What a run over a checkpoint needs in memory, and how much it may do at once.

The numbers are upper bounds from the sizes of the model: the largest layer in float32, what scoring or re-fitting it adds, and the
activations of the fewest windows. What is left of ``--memory`` goes to more windows at once and to hidden states, which are on
disk otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from regraft.errors import InputError
from regraft.importance.criteria import LooksAt
from regraft.models.view import ModelView
from regraft.streaming.passes import BATCH, Limits
from regraft.streaming.skeleton import Skeleton

# The interpreter and the libraries. What the process that calls us holds beyond them is not ours to count.
MOST_PROGRAM_BYTES = 700_000_000
# What the program grows by when it works: buffers of the allocator and of the matrix library, pieces that are being written.
SPARE_BYTES = 150_000_000
HEAD_TOKENS = 64
F32, F64 = 4, 8


@dataclass(frozen=True)
class Task:
    """What is to be done with a checkpoint.

    Attributes:
        looks_at: What the criterion looks at; None where nothing is scored.
        squares: Whether it wants squared gradients.
        refits: Whether reading projections are re-fitted.
        windows: Calibration windows; 0 without text.
        tokens: Of a window.
    """

    looks_at: LooksAt | None
    squares: bool
    refits: bool
    windows: int
    tokens: int


@dataclass(frozen=True)
class Room:
    """How a run stays within its memory.

    Attributes:
        limits: How much is done at once.
        hidden_in_memory: Whether the hidden states of the windows are in memory rather than on disk.
        working_bytes: What the run needs beside the program, hidden states aside.
        hidden_bytes: What the hidden states take.
        program_bytes: What the program itself takes.
        bound_bytes: What was asked for.
    """

    limits: Limits
    hidden_in_memory: bool
    working_bytes: int
    hidden_bytes: int
    program_bytes: int
    bound_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the program itself is within the bound too."""
        return self.working_bytes + self.program_bytes <= self.bound_bytes


def find_room(skeleton: Skeleton, task: Task, bound_bytes: int) -> Room:
    """Decides how much is done at once.

    Raises:
        InputError: The bound is below what one layer needs; the message says how much that is.
    """
    sizes = _Sizes.of(skeleton)
    program = min(psutil.Process().memory_info().rss, MOST_PROGRAM_BYTES) + SPARE_BYTES
    parts = _parts(sizes, task)
    needed = sum(parts.values())
    if needed > bound_bytes:
        listed = ", ".join(f"{in_words(value)} for {what}" for what, value in parts.items() if value)
        raise InputError(
            f"--memory {in_words(bound_bytes)} is below what one layer needs, {in_words(needed)}: {listed}; "
            f"use --memory {in_words(needed + program)} or more (the program itself takes {in_words(program)})"
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


def in_words(count_bytes: int) -> str:
    """Returns a number of bytes as ``--memory`` takes it, rounded up.

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
        layer: Parameters of the largest layer.
        largest: Values of the largest tensor of a layer.
        readers: Widths of the projections that read prunable channels, for the layer where they are largest.
        features: Inputs and outputs of all projections of a layer, added up: floats of activations of one token.
        channels: Of the residual stream.
        vocabulary: Rows of the output projection.
        outside: Parameters that are always there: norms and positions.
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
        """Activations of a forward pass of one batch, some of them in double precision for their moments."""
        return BATCH * tokens * (self.features * F32 + max(self.readers, default=0) * 2 * F64)

    def backward_bytes(self, tokens: int) -> int:
        """Activations of a forward and backward pass of one window."""
        return tokens * self.features * 3 * F32


def _parts(sizes: _Sizes, task: Task) -> Mapping[str, int]:
    """Returns what the phase that needs most takes, by what it is for."""
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
    return sum(sum(module.get_parameter("weight").shape) for module in modules if module is not None)
