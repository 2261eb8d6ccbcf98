"""Encoders with linear layers that are stored as two thin matrices.

This file travels with every factored encoder, beside ``factored_regraft.py``; it needs nothing but torch and transformers. The config is
the stock one with the entries ``factored``, which names the layers and their ranks, and ``factor_layout``.
"""

from __future__ import annotations

from typing import Any

import transformers

from .factored_regraft import PLAIN, fit_factors

STOCK = (
    "BertModel",
    "RobertaModel",
    "XLMRobertaModel",
    "CamembertModel",
    "ElectraModel",
    "DistilBertModel",
    "MPNetModel",
    "DebertaV2Model",
    "ModernBertModel",
)
"""Classes of transformers that have a factored form here, named ``Factored`` and the name of the class."""


def factored_class(name: str) -> Any:
    """Returns the class of a factored encoder.

    Args:
        name: Name of the stock class.
    """
    stock: Any = getattr(transformers, name)

    def __init__(self: Any, config: Any, *rest: Any, **named: Any) -> None:
        stock.__init__(self, config, *rest, **named)
        fit_factors(self, getattr(config, "factored", None) or {}, getattr(config, "factor_layout", None) or PLAIN)
        self.post_init()

    return type(f"Factored{name}", (stock,), {"__init__": __init__, "__module__": __name__, "__doc__": f"A factored ``{name}``."})


def __getattr__(name: str) -> Any:
    """Returns the class of this name, made when it is first asked for."""
    if name.startswith("Factored") and name.removeprefix("Factored") in STOCK:
        return globals().setdefault(name, factored_class(name.removeprefix("Factored")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
