"""Measurements of one model: loss, size, speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossReport:
    """Loss of a causal language model on one text, and everything needed to measure it again.

    Attributes:
        loss_nats: Mean negative log-likelihood of a predicted token.
        perplexity: ``exp(loss_nats)``.
        bits_per_byte: Total negative log-likelihood in bits over the bytes of the text that was predicted.
        window_tokens: Longest context.
        stride_tokens: Distance between the starts of two windows; tokens in the overlap are context only.
        tokens: How many tokens were predicted.
        bytes: How many bytes of text those tokens are.
        documents: How many documents were read.
        bos: Whether every document starts with the beginning-of-sequence token.
        text: What was read: a file name or the name of a built-in text.
        split: Which part of it, such as ``test``.
    """

    loss_nats: float
    perplexity: float
    bits_per_byte: float
    window_tokens: int
    stride_tokens: int
    tokens: int
    bytes: int
    documents: int
    bos: bool
    text: str
    split: str


@dataclass(frozen=True)
class SizeReport:
    """How large a model is.

    Attributes:
        parameters: Tied ones counted once.
        bytes_on_disk: Of its safetensors files; 0 when it was never saved.
        bytes_in_memory: Of its parameters and buffers.
        macs_per_token: Multiply-accumulates of one token's forward pass, head included, attention over ``context_tokens``.
        context_tokens: Context that ``macs_per_token`` assumes.
    """

    parameters: int
    bytes_on_disk: int
    bytes_in_memory: int
    macs_per_token: int
    context_tokens: int


@dataclass(frozen=True)
class SpeedReport:
    """How fast a model runs, as medians of repeated measurements on one machine.

    Attributes:
        prefill_seconds: One forward pass over ``prompt_tokens``.
        decode_seconds_per_token: One step of generation with a KV cache after that prompt.
        peak_memory_bytes: Largest resident memory while measuring (device memory on a GPU).
        prompt_tokens: Length of the prompt.
        decoded_tokens: How many tokens were generated.
        repeats: How many measurements the medians are of.
        threads: CPU threads in use.
        device: Where it ran.
    """

    prefill_seconds: float
    decode_seconds_per_token: float
    peak_memory_bytes: int
    prompt_tokens: int
    decoded_tokens: int
    repeats: int
    threads: int
    device: str


@dataclass(frozen=True)
class Measurement:
    """Everything that one harness measured of one model.

    Attributes:
        label: Which model: ``dense``, ``pruned``, ``recovered`` or a path.
        loss: On the held-out text.
        size: Parameters, bytes and MACs.
        speed: Prefill and decode; None when it was not asked for.
    """

    label: str
    loss: LossReport
    size: SizeReport
    speed: SpeedReport | None = None
