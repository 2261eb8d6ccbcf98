"""How fast a model runs and how much memory that takes.

Times are medians of repeats after a warm-up. Several models are measured in turns, repeat by repeat, so that whatever else the
machine does meanwhile slows all of them alike and their ratios can be trusted. Memory is watched in a pass of its own, since
watching costs time.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.data.tokens import context_limit
from regraft.errors import InputError
from regraft.evaluation.inference import evaluating, input_device, vocabulary_size
from regraft.plans import SpeedReport

PROMPT_TOKENS = 256
DECODED_TOKENS = 32
REPEATS = 5

_SAMPLE_SECONDS = 0.002


@dataclass
class _Pass:
    """Seconds of one repeat."""

    prefill: float
    decode: float


def measure_speed(
    model: PreTrainedModel,
    prompt_tokens: int | None = None,
    decoded_tokens: int | None = None,
    repeats: int = REPEATS,
    *,
    seed: int = 0,
) -> SpeedReport:
    """Measures one model; see :func:`compare_speed`."""
    return compare_speed({"model": model}, prompt_tokens, decoded_tokens, repeats, seed=seed)["model"]


def compare_speed(
    models: Mapping[str, PreTrainedModel],
    prompt_tokens: int | None = None,
    decoded_tokens: int | None = None,
    repeats: int = REPEATS,
    *,
    seed: int = 0,
) -> dict[str, SpeedReport]:
    """Measures prefill, decode with a KV cache, and peak memory of several models, in turns.

    Peak memory is that of the process (of the device on a GPU) at its highest, less the weights of the other models here.

    Args:
        models: At least one, by label.
        prompt_tokens: Of one random prompt; None for 256, or what the shortest context leaves.
        decoded_tokens: Generated after it; None for 32, or what the shortest context leaves.
        repeats: How many measurements the medians are of, after one more that warms up.
        seed: Of the prompt.

    Raises:
        InputError: A count is below 1, or prompt and generated tokens exceed the context of a model.
    """
    lengths = _lengths(models, prompt_tokens, decoded_tokens)
    if repeats < 1:
        raise InputError(f"{repeats} repeats measure nothing; use at least 1")
    prompts = {label: _prompt(model, lengths[0], seed) for label, model in models.items()}
    passes: dict[str, list[_Pass]] = {label: [] for label in models}
    for turn in range(repeats + 1):
        for label, model in models.items():
            measured = _run(model, prompts[label], lengths[1])
            if turn:
                passes[label].append(measured)
    return {
        label: SpeedReport(
            prefill_seconds=statistics.median(one.prefill for one in passes[label]),
            decode_seconds_per_token=statistics.median(one.decode for one in passes[label]) / lengths[1],
            peak_memory_bytes=_peak_memory_bytes(model, prompts[label], lengths[1]) - _bytes_of_others(model, models),
            prompt_tokens=lengths[0],
            decoded_tokens=lengths[1],
            repeats=repeats,
            threads=torch.get_num_threads(),
            device=str(input_device(model)),
        )
        for label, model in models.items()
    }


def _lengths(models: Mapping[str, PreTrainedModel], prompt: int | None, decoded: int | None) -> tuple[int, int]:
    """Returns prompt and generated tokens, within every model's context."""
    limits = [limit for limit in (context_limit(model.config) for model in models.values()) if limit is not None]
    limit = min(limits, default=None)
    if decoded is None:
        decoded = DECODED_TOKENS if limit is None else max(1, min(DECODED_TOKENS, limit // 4))
    if prompt is None:
        prompt = PROMPT_TOKENS if limit is None else max(1, min(PROMPT_TOKENS, limit - decoded))
    if prompt < 1 or decoded < 1:
        raise InputError(f"a prompt of {prompt} and {decoded} generated tokens measure nothing; use at least 1 of each")
    if limit is not None and prompt + decoded > limit:
        raise InputError(f"a prompt of {prompt} and {decoded} generated tokens exceed the model's context of {limit}; use fewer of either")
    return prompt, decoded


def _prompt(model: PreTrainedModel, tokens: int, seed: int) -> Tensor:
    """Returns random token ids, shape ``(1, tokens)``."""
    ids = torch.randint(vocabulary_size(model), (1, tokens), generator=torch.Generator().manual_seed(seed))
    return ids.to(input_device(model))


def _run(model: PreTrainedModel, prompt_BL: Tensor, decoded_tokens: int) -> _Pass:
    """Reads a prompt and generates greedily after it, timing both."""
    wait: Callable[[], None] = torch.cuda.synchronize if prompt_BL.is_cuda else lambda: None
    with evaluating(model):
        wait()
        start = time.perf_counter()
        out = model(input_ids=prompt_BL, use_cache=True)
        next_B1 = out.logits[:, -1:].argmax(-1)
        wait()
        filled = time.perf_counter()
        for _ in range(decoded_tokens):
            out = model(input_ids=next_B1, past_key_values=out.past_key_values, use_cache=True)
            next_B1 = out.logits[:, -1:].argmax(-1)
        wait()
        end = time.perf_counter()
    return _Pass(filled - start, end - filled)


def _peak_memory_bytes(model: PreTrainedModel, prompt_BL: Tensor, decoded_tokens: int) -> int:
    """Returns the most memory in use during one pass: resident on the CPU, allocated on a GPU."""
    gc.collect()
    if prompt_BL.is_cuda:
        torch.cuda.reset_peak_memory_stats(prompt_BL.device)
        _run(model, prompt_BL, decoded_tokens)
        return torch.cuda.max_memory_allocated(prompt_BL.device)
    with _watched_memory() as highest:
        _run(model, prompt_BL, decoded_tokens)
    return max(highest)


@contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """Samples the resident memory of this process from a thread; gives the list that the samples go to."""
    process = psutil.Process()
    samples = [process.memory_info().rss]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(process.memory_info().rss)


def _bytes_of_others(model: nn.Module, models: Mapping[str, nn.Module]) -> int:
    """Returns the bytes of all storages that only the other models hold, on the same kind of device."""
    own = _storages(model)
    others = {pointer: size for other in models.values() if other is not model for pointer, size in _storages(other).items()}
    return sum(size for pointer, size in others.items() if pointer not in own)


def _storages(model: nn.Module) -> dict[tuple[torch.device, int], int]:
    """Returns the size in bytes of every storage that a model's parameters and buffers lie in, by its address."""
    tensors = [*model.parameters(), *model.buffers()]
    return {(tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes() for tensor in tensors}
