"""What can be trained beside frozen weights: one file an adapter, found by name in :data:`ADAPTERS`."""

from regraft.adapters import deep_lora, peft_kinds
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
    "deep_lora",
    "make_request",
    "make_specs",
    "peft_kinds",
]
