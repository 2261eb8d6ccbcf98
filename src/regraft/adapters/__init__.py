"""What can be trained beside frozen weights: one file an adapter, found by name in :data:`ADAPTERS`."""

from regraft.adapters import peft_backed
from regraft.adapters.contract import ADAPTERS, Adapter, AdapterRequest, make_request

__all__ = ["ADAPTERS", "Adapter", "AdapterRequest", "make_request", "peft_backed"]
