"""Measurements of one model: loss, size, speed."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.in_short import named

LOSS_UNITS = {"language": "nats a token", "classification": "nats a row", "regression": "squared error a row"}
"""Unit of the held-out loss, by task."""


@dataclass(frozen=True)
class LossReport:
    """Loss of a causal language model on one text, with all conditions needed to measure it again.

    Attributes:
        loss_nats: Mean negative log-likelihood of a predicted token.
        perplexity: ``exp(loss_nats)``.
        bits_per_byte: Total negative log-likelihood in bits, divided by the bytes of the predicted text.
        window_tokens: Longest context.
        stride_tokens: Distance between the starts of two windows; tokens in the overlap are only context.
        tokens: Number of predicted tokens.
        bytes: Number of bytes of the predicted text.
        documents: Number of documents.
        bos: Whether every document starts with the beginning-of-sequence token.
        text: File name, or name of a built-in text.
        split: Part of the text, such as ``test``.
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
    """Size of a model.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        bytes_on_disk: Size of the model's safetensors files; 0 when it was never saved.
        bytes_in_memory: Size of the model's parameters and buffers.
        macs_per_token: Multiply-accumulates of one token's forward pass, with the head, and with attention over ``context_tokens``.
        context_tokens: Context that ``macs_per_token`` assumes.
    """

    parameters: int
    bytes_on_disk: int
    bytes_in_memory: int
    macs_per_token: int
    context_tokens: int


@dataclass(frozen=True)
class SpeedReport:
    """Speed of a model: medians of repeated measurements on one machine.

    Attributes:
        prefill_seconds: Time of one forward pass over ``prompt_tokens``.
        decode_seconds_per_token: Time of one step of generation with a KV cache, after that prompt.
        peak_memory_bytes: Largest resident memory while measuring (device memory on a GPU).
        prompt_tokens: Length of the prompt.
        decoded_tokens: Number of generated tokens.
        repeats: Number of measurements for the medians.
        threads: Number of CPU threads in use.
        device: Device of the measurement.
        prefill_low_seconds: The fastest repeat of the prefill.
        prefill_high_seconds: The slowest; fastest and slowest enclose the median with a confidence of ``1 - 2 ** (1 - repeats)``.
        decode_low_seconds_per_token: The fastest repeat of decoding.
        decode_high_seconds_per_token: The slowest.
        prefill_flop: Operations of the prefill; a multiply-accumulate is two.
        prefill_floor_seconds: The least time for these and for reading the weights once, at rates that the machine reached.
        decode_bytes: Bytes of the weights that each step of decoding reads.
        decode_floor_seconds: The least time of a step.
    """

    prefill_seconds: float
    decode_seconds_per_token: float
    peak_memory_bytes: int
    prompt_tokens: int
    decoded_tokens: int
    repeats: int
    threads: int
    device: str
    # Zero in records of versions that did not measure them.
    prefill_low_seconds: float = 0.0
    prefill_high_seconds: float = 0.0
    decode_low_seconds_per_token: float = 0.0
    decode_high_seconds_per_token: float = 0.0
    prefill_flop: int = 0
    prefill_floor_seconds: float = 0.0
    decode_bytes: int = 0
    decode_floor_seconds: float = 0.0

    @property
    def confidence(self) -> float:
        """The confidence with which the fastest and the slowest repeat enclose the median."""
        return 1 - 2.0 ** (1 - self.repeats)


@dataclass(frozen=True, repr=False)
class Measurement:
    """All measurements of one model.

    Attributes:
        label: Label of the model: ``dense``, ``pruned``, ``recovered`` or a path.
        loss: Loss on the held-out text.
        size: Parameters, bytes and MACs.
        speed: Prefill and decode times; None when speed was not measured.
    """

    label: str
    loss: LossReport
    size: SizeReport
    speed: SpeedReport | None = None

    def __repr__(self) -> str:
        """Returns the label, the loss and the parameters in one short line."""
        return named("Measurement", {"label": self.label, "loss_nats": self.loss.loss_nats, "parameters": self.size.parameters})
