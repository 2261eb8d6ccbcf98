"""Mean gradients of the training loss with respect to weights, a few modules at a time.

All gradients of a large model would take as much memory as the model. Therefore the modules are split, in the order of the model, into
parts whose float32 gradients fit into :data:`AT_ONCE_BYTES` (at least one module each), and the batches pass through the model once for
every part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapters.contract import Evidence
from regraft.adapters.linear_like import is_table, oriented, weight_of
from regraft.errors import InputError
from regraft.models.trainable import only_these_train

AT_ONCE_BYTES = 512 * 2**20


def first_gradients(
    model: nn.Module, modules: Mapping[str, nn.Module], evidence: Evidence, batches: int, at_once_bytes: int = AT_ONCE_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yields the mean gradient of every module's weight, ``(out, in)`` float32, without dropout; the model is restored at the end.

    The gradient of an embedding comes only from its look-ups, also when a head shares its table.

    Args:
        model: The model that takes the batches.
        modules: Modules by full name, in the order of the model.
        evidence: Training batches and the loss.
        batches: Number of batches in the mean.
        at_once_bytes: Largest memory of the gradients of one part.

    Raises:
        InputError: A gradient is not finite, or zero.
    """
    drawn = evidence.batches(batches)
    for names in _parts(modules, at_once_bytes):
        part = {name: modules[name] for name in names}
        sums = {name: torch.zeros_like(weight_of(module), dtype=torch.float32) for name, module in part.items()}
        with only_these_train(model, _matrices(part)), torch.enable_grad():
            for batch in drawn:
                _add_gradients(model, part, evidence, batch, sums)
        for name in names:
            mean = sums.pop(name) / len(drawn)
            _check(name, mean)
            yield name, oriented(part[name], mean)


def _parts(modules: Mapping[str, nn.Module], at_once_bytes: int) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for name, module in modules.items():
        size = 4 * weight_of(module).numel()
        if part and held + size > at_once_bytes:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part


def _add_gradients(
    model: nn.Module, part: Mapping[str, nn.Module], evidence: Evidence, batch: Mapping[str, Tensor], sums: Mapping[str, Tensor]
) -> None:
    """Adds one batch's gradients to the sums; those of embeddings come from the gradients of their look-ups."""
    looked_up: dict[str, list[tuple[Tensor, Tensor]]] = {}
    tables = {name: module for name, module in part.items() if is_table(module)}
    weights = {name: weight_of(module) for name, module in part.items() if name not in tables}
    hooks = [module.register_forward_hook(_keep(looked_up.setdefault(name, []))) for name, module in tables.items()]
    try:
        loss = evidence.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [output for kept in looked_up.values() for _, output in kept]
    found = torch.autograd.grad(loss, [*weights.values(), *outputs])
    for name, gradient in zip(weights, found[: len(weights)], strict=True):
        sums[name].add_(gradient.float())
    gradients = iter(found[len(weights) :])
    for name, kept in looked_up.items():
        scale = getattr(tables[name], "embed_scale", 1.0)
        for ids, _ in kept:
            gradient = next(gradients).float() * scale
            sums[name].index_add_(0, ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))


def _keep(kept: list[tuple[Tensor, Tensor]]) -> Any:
    """Returns a hook that records ids and look-ups, and makes the look-ups leaves of the graph."""

    def hook(module: nn.Module, arguments: Sequence[Tensor], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        kept.append((arguments[0], leaf))
        return leaf

    return hook


def _matrices(part: Mapping[str, nn.Module]) -> list[Tensor]:
    """Returns the weights that gradients are taken of; an embedding's comes from its output."""
    return [weight_of(module) for module in part.values() if not is_table(module)]


def _check(name: str, gradient: Tensor) -> None:
    size = float(gradient.abs().max())
    if not size < float("inf"):
        raise InputError(f"the first gradient of '{name}' is not finite; use `precision=float32`, or other data")
    if size == 0.0:
        raise InputError(f"the first gradient of '{name}' is zero, so it shows no directions to adapt; leave it out with `targets`")
