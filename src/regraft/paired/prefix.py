"""The layers below the first adapted one, whose output is the same for all adapters and all steps.

Legend of shapes: K adapters in one pass, B rows of a batch, T tokens, D residual channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.models.view import ModelView

Batch = Mapping[str, Tensor]


@final
class KeptTensors:
    """Tensors by key, which are kept up to a number of bytes; those that do not fit are made again each time.

    Args:
        limit_bytes: Size of all kept tensors.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes
        self._kept: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Returns the tensor of a key, and makes it if it is not in the cache."""
        if key in self._kept:
            return self._kept[key]
        tensor = make()
        size = tensor.numel() * tensor.element_size()
        if size <= self._left_bytes:
            self._left_bytes -= size
            self._kept[key] = tensor
        return tensor


@final
class Prefix:
    """The layers of a model below the first one that holds an adapted module.

    Args:
        view: The model.
        adapted: Full names of the adapted modules.
        kept: Where hidden states are kept between passes.

    Attributes:
        layers: Number of layers below the first adapted one.
    """

    def __init__(self, view: ModelView, adapted: Iterable[str], kept: KeptTensors) -> None:
        names = tuple(adapted)
        inside = (any(name.startswith(f"{view.layer_name(index)}.") for name in names) for index in range(len(view.layers)))
        self.layers = next(index for index, found in enumerate(inside) if found)
        self._view = view
        self._kept = kept

    def logits(self, model: PreTrainedModel, inputs: Batch, key: Hashable, copies: int) -> Tensor:
        """Returns the logits of K repetitions of a batch, (K * B, T, V).

        The layers below run once for a batch, and never again while its hidden states are kept.

        Args:
            model: The model.
            inputs: ``input_ids`` and, if rows are padded, ``attention_mask``, both (B, T), on the model's device.
            key: Key of the batch's hidden states among the kept tensors.
            copies: Number of adapters, K.
        """
        repeated = {name: tensor.repeat(copies, 1) for name, tensor in inputs.items()}
        if self.layers == 0:
            return model(**repeated, use_cache=False).logits
        hidden_BTD = self._kept.get(key, lambda: self._below(model, inputs))
        with self._skipping(hidden_BTD.repeat(copies, 1, 1)):
            return model(**repeated, use_cache=False).logits

    @torch.no_grad()
    def _below(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        """Returns the input of the first adapted layer, (B, T, D), without computing that layer or later ones."""
        seen: list[Tensor] = []

        def stop(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(arguments[0] if arguments else named["hidden_states"])
            raise _EnoughError

        handle = self._view.layers[self.layers].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model(**inputs, use_cache=False)
        except _EnoughError:
            pass
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def _skipping(self, hidden: Tensor) -> Iterator[None]:
        """Skips the layers below the first adapted one inside the block, and uses the given hidden states as its input."""

        def instead(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((hidden, *arguments[1:]), named) if arguments else ((), named | {"hidden_states": hidden})

        below = list(self._view.layers[: self.layers])
        handle = self._view.layers[self.layers].register_forward_pre_hook(instead, with_kwargs=True)
        try:
            for layer in below:
                layer.__dict__["forward"] = _unchanged
            yield
        finally:
            handle.remove()
            for layer in below:
                layer.__dict__.pop("forward", None)


class _EnoughError(Exception):
    """Raised to end a forward pass early."""


def _unchanged(*arguments: Any, **named: Any) -> Any:
    """Returns the hidden states unchanged; replaces a skipped layer's forward."""
    return arguments[0] if arguments else named["hidden_states"]
