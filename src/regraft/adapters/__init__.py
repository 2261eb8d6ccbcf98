"""Adapters: small trainable changes of frozen weights, one file each, registered by name in :data:`ADAPTERS`."""

from regraft.adapters.contract import (
    ADAPTERS,
    Adapter,
    AdapterRequest,
    Defaults,
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
    "Defaults",
    "Delta",
    "Evidence",
    "Grouped",
    "LowRank",
    "Method",
    "ParameterGroup",
    "Spec",
    "make_request",
    "make_specs",
]
