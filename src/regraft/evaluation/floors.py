"""The least time that a forward pass can take: its operations and the bytes that it must read, at rates that this machine reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from regraft.evaluation.inference import input_device
from regraft.evaluation.size import bytes_in_memory, macs_per_token

_SIDE = 768  # of the square matrices whose product gives the rate of operations
_REPEATS = 5
_LARGEST_READ = 1 << 28


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without.

    Attributes:
        flop: Operations; a multiply-accumulate is two.
        bytes: Bytes of weights that are read at least once.
    """

    flop: int
    bytes: int


@dataclass(frozen=True)
class Rates:
    """What a machine reached in simple loops: a product of two matrices, and a read as long as the model's weights.

    Attributes:
        flop_per_second: Operations a second in the model's type of number.
        bytes_per_second: Bytes a second.
    """

    flop_per_second: float
    bytes_per_second: float

    def floor_seconds(self, work: Work) -> float:
        """Returns the time of the slower of both, as if the other were free."""
        return max(work.flop / self.flop_per_second, work.bytes / self.bytes_per_second)


def work_of(model: PreTrainedModel, tokens: int, context_tokens: int) -> Work:
    """Returns the work of one forward pass.

    Args:
        model: A model of a known family.
        tokens: Number of tokens in the pass.
        context_tokens: Number of tokens that each of them attends to, on average.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    tied = head is not None and head.weight is weight
    looked_up = 0 if tied else weight.numel() * weight.element_size()  # single rows are read, not the table
    return Work(2 * tokens * macs_per_token(model, context_tokens), bytes_in_memory(model) - looked_up)


def rates_of(model: PreTrainedModel) -> Rates:
    """Measures the machine for a model: the fastest of several repeats, after a warm-up."""
    device, dtype = input_device(model), model.dtype
    matrix = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    size = min(_LARGEST_READ, bytes_in_memory(model))
    block = torch.zeros(max(1, size // 4), dtype=torch.float32, device=device)
    product = _fastest(lambda: matrix @ matrix, device)
    read = _fastest(lambda: block.sum(), device)
    return Rates(2 * _SIDE**3 / product, block.numel() * 4 / read)


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of several runs."""
    seconds: list[float] = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:]), 1e-9)
