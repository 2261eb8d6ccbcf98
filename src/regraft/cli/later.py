"""Functions that are imported when they are called, so that a command's help and its errors do not wait for torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def later(module: str, name: str) -> Callable[..., Any]:
    """Returns a function that imports ``module`` when it is called and calls the function ``name`` of it.

    Type checkers are given the function itself::

        if TYPE_CHECKING:
            from regraft.pipelines.inspect import inspect_model
        else:
            inspect_model = later("regraft.pipelines.inspect", "inspect_model")
    """

    def call(*positional: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*positional, **named)

    return call
