"""Speed and peak memory of models.

Times are medians of repeats after a warm-up, with the fastest and the slowest, and beside them the least that they can be. Several models
are measured in turns, repeat by repeat, so that other load on the machine slows all of them equally and their ratios are reliable. Memory
is measured in a separate pass, because sampling it takes time.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.data.tokens import context_limit
from regraft.errors import InputError
from regraft.evaluation.floors import rates_of, work_of
from regraft.evaluation.inference import input_device, vocabulary_size
from regraft.models.trainable import evaluating
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

    Peak memory is the highest memory of the process (on a GPU: of the device), minus the weights of the other models.

    Args:
        models: At least one model, by label.
        prompt_tokens: Length of one random prompt; None for 256, or less if the shortest context requires it.
        decoded_tokens: Number of tokens generated after the prompt; None for 32, or less if the shortest context requires it.
        repeats: Number of measurements for the medians, after one warm-up.
        seed: Seed of the prompt.

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
    peaks = {
        label: _peak_memory_bytes(model, prompts[label], lengths[1]) - _bytes_of_others(model, models) for label, model in models.items()
    }
    return {label: _report(model, passes[label], peaks[label], lengths) for label, model in models.items()}


def _report(model: PreTrainedModel, passes: Sequence[_Pass], peak_memory_bytes: int, lengths: tuple[int, int]) -> SpeedReport:
    """Returns medians, the fastest and the slowest repeat, and what a pass takes at least."""
    prompt, decoded = lengths
    prefill, decode = [one.prefill for one in passes], [one.decode / decoded for one in passes]
    filling = work_of(model, prompt, (prompt + 1) // 2)
    step = work_of(model, 1, prompt + (decoded + 1) // 2)
    rates = rates_of(model)
    return SpeedReport(
        prefill_seconds=statistics.median(prefill),
        decode_seconds_per_token=statistics.median(decode),
        peak_memory_bytes=peak_memory_bytes,
        prompt_tokens=prompt,
        decoded_tokens=decoded,
        repeats=len(passes),
        threads=torch.get_num_threads(),
        device=str(input_device(model)),
        prefill_low_seconds=min(prefill),
        prefill_high_seconds=max(prefill),
        decode_low_seconds_per_token=min(decode),
        decode_high_seconds_per_token=max(decode),
        prefill_flop=filling.flop,
        prefill_floor_seconds=rates.floor_seconds(filling),
        decode_bytes=step.bytes,
        decode_floor_seconds=rates.floor_seconds(step),
    )


def _lengths(models: Mapping[str, PreTrainedModel], prompt: int | None, decoded: int | None) -> tuple[int, int]:
    """Returns the numbers of prompt tokens and of generated tokens, within every model's context."""
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
    """Reads a prompt, generates tokens greedily after it, and times both."""
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
    """Returns the peak memory during one pass: resident memory on the CPU, allocated memory on a GPU."""
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
    """Samples the resident memory of this process in a thread; yields the list of samples."""
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
    """Returns the bytes of all storages that only the other models use, on the same kind of device."""
    own = _storages(model)
    others = {pointer: size for other in models.values() if other is not model for pointer, size in _storages(other).items()}
    return sum(size for pointer, size in others.items() if pointer not in own)


def _storages(model: nn.Module) -> dict[tuple[torch.device, int], int]:
    """Returns the size in bytes of every storage of a model's parameters and buffers, by device and address."""
    tensors = [*model.parameters(), *model.buffers()]
    return {(tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes() for tensor in tensors}
