"""Adapters: small trainable changes of frozen weights, one file each, registered by name in :data:`ADAPTERS`."""

from regraft.adapters import adalora, block_lora, deep_lora, diagonal, lora_xs, mora, nola, peft_kinds
from regraft.adapters.contract import (
    ADAPTERS,
    Adapter,
    AdapterRequest,
    Delta,
    Evidence,
    Grouped,
    LowRank,
    Method,
    ParameterGroup,
    Spec,
    make_request,
    make_specs,
)

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterRequest",
    "Delta",
    "Evidence",
    "Grouped",
    "LowRank",
    "Method",
    "ParameterGroup",
    "Spec",
    "adalora",
    "block_lora",
    "deep_lora",
    "diagonal",
    "lora_xs",
    "make_request",
    "make_specs",
    "mora",
    "nola",
    "peft_kinds",
]
