"""Moments of the inputs and of the output gradients of a model's linear layers, which compression methods use as evidence.

One pass of the calibration text, forwards and, where gradients are asked for, back. Moments are float64 and quadratic in the widths; layers
that read the same tensor share theirs, and where all together would take too much, several passes each watch a part of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regraft.compression.contract import Evidence, LooksAt
from regraft.errors import InputError
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.numerics.moments import Moments
from regraft.numerics.pooled import PooledMoments

GROUPS = 32  # of calibration windows, within which covariances are taken (Bolaco, arXiv 2405.10616, section 4.1)
BATCH = 8
# Moments of one pass over the text; a model of a few hundred million parameters takes a handful of passes.
MOST_BYTES = 1_000_000_000


@dataclass
class _Seen:
    """The moments that one pass collects.

    Attributes:
        inputs: Moments of each tensor, under the name of the first layer that reads it.
        reads: For each layer, the key of its inputs in ``inputs``.
        gradients: Moments of the output gradients, by layer.
    """

    inputs: dict[str, PooledMoments] = field(default_factory=dict[str, PooledMoments])
    reads: dict[str, str] = field(default_factory=dict[str, str])
    gradients: dict[str, Moments] = field(default_factory=dict[str, Moments])


def gather(
    model: PreTrainedModel,
    projections: Mapping[str, nn.Module],
    windows_NT: Tensor | None,
    looks_at: LooksAt,
    *,
    transposed: bool = False,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
) -> Iterator[Evidence]:
    """Yields the evidence of every projection, in their order.

    Args:
        model: In evaluation mode; left as it is.
        projections: Its linear layers by full name, in the order in which the model calls them.
        windows_NT: Calibration tokens, int64 (windows, tokens); None where weights alone are looked at.
        looks_at: Evidence that is needed in addition to the weights.
        transposed: Whether weights are stored (in, out).
        seed: Seed for the tokens drawn from the model's predictions.
        most_bytes: Moments in memory at a time; more take more passes over the text.

    Raises:
        InputError: Inputs or gradients hold NaN or infinity; the message names the layer and the batch.
    """
    if looks_at == "weights":
        yield from (Evidence(name, _weight(module, transposed)) for name, module in projections.items())
        return
    assert windows_NT is not None
    for part in _parts(projections, looks_at, transposed, most_bytes):
        seen = _watch(model, part, windows_NT, looks_at, seed)
        for name, module in part.items():
            yield Evidence(name, _weight(module, transposed), seen.inputs[seen.reads[name]], seen.gradients.get(name))


def grouped_batches(windows_NT: Tensor) -> list[tuple[int, Tensor]]:
    """Returns batches of windows, none of which crosses from one group into the next, each with the number of its group."""
    groups = min(GROUPS, len(windows_NT))
    bounds = [round(index * len(windows_NT) / groups) for index in range(groups + 1)]
    return [(index, batch) for index in range(groups) for batch in windows_NT[bounds[index] : bounds[index + 1]].split(BATCH)]


def drawn_log_likelihood(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the summed log-likelihood of one token drawn from each prediction; its gradients are those of the Fisher information."""
    rows_NV = functional.log_softmax(logits_BTV.flatten(0, 1).float(), dim=-1)
    tokens_N1 = torch.multinomial(rows_NV.detach().exp(), 1, generator=generator)
    return rows_NV.gather(1, tokens_N1).sum()


def refuse_strange(rows: Tensor, what: str, batch: int) -> None:
    """Refuses NaN and infinity.

    Raises:
        InputError: There are some.
    """
    if not bool(torch.isfinite(rows).all()):
        raise InputError(
            f"{what} hold NaN or infinity in batch {batch} of the calibration text; use `dtype=float32` or other calibration text"
        )


def moment_bytes(rows: int, columns: int, looks_at: LooksAt) -> int:
    """Returns the bytes of one layer's moments, were its inputs its own."""
    return 8 * (columns * columns + (rows * rows if looks_at == "gradients" else 0))


def _parts(projections: Mapping[str, nn.Module], looks_at: LooksAt, transposed: bool, most_bytes: int) -> Iterator[dict[str, nn.Module]]:
    """Yields the projections in parts whose moments fit."""
    part: dict[str, nn.Module] = {}
    total = 0
    for name, module in projections.items():
        rows, columns = _weight(module, transposed).shape
        needed = moment_bytes(rows, columns, looks_at)
        if part and total + needed > most_bytes:
            yield part
            part, total = {}, 0
        part[name] = module
        total += needed
    if part:
        yield part


def _watch(model: PreTrainedModel, part: Mapping[str, nn.Module], windows_NT: Tensor, looks_at: LooksAt, seed: int) -> _Seen:
    batches = grouped_batches(windows_NT)
    groups = 1 + batches[-1][0]
    seen = _Seen()
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}
    with_gradients = looks_at == "gradients"

    def hook(name: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            entering[name] = inputs[0].detach()
            if not with_gradients:
                return None
            if not output.requires_grad:  # the lowest layers that are watched: nothing below them is asked for
                output = output.detach().requires_grad_()
            leaving[name] = output
            return output

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in part.items()]
    generator = torch.Generator(model.device).manual_seed(seed)
    try:
        with float32_on_cpu(model), only_these_train(model, ()), torch.set_grad_enabled(with_gradients):
            for number, (group, ids) in enumerate(batches, 1):
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits
                _add_inputs(seen, entering, group, groups, number)
                if with_gradients:
                    _add_gradients(seen, leaving, drawn_log_likelihood(logits, generator), number)
                entering.clear()
                leaving.clear()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _add_inputs(seen: _Seen, entering: Mapping[str, Tensor], group: int, groups: int, number: int) -> None:
    if not seen.reads:
        seen.reads = _readers(entering)
    for name in dict.fromkeys(seen.reads.values()):
        rows = entering[name]
        refuse_strange(rows, f"inputs of '{name}'", number)
        if name not in seen.inputs:
            seen.inputs[name] = PooledMoments.empty(rows.shape[-1], groups, rows.device)
        seen.inputs[name].add(rows, group)


def _readers(entering: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns, for each layer, the first one that reads the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(rows.data_ptr(), name) for name, rows in entering.items()}


def _add_gradients(seen: _Seen, leaving: Mapping[str, Tensor], likelihood: Tensor, number: int) -> None:
    outputs: Sequence[Tensor] = list(leaving.values())
    for name, gradient in zip(leaving, torch.autograd.grad(likelihood, outputs), strict=True):
        refuse_strange(gradient, f"gradients at the outputs of '{name}'", number)
        if name not in seen.gradients:
            seen.gradients[name] = Moments.empty(gradient.shape[-1], gradient.device)
        seen.gradients[name].add(gradient)


def _weight(module: nn.Module, transposed: bool) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight.T if transposed else weight
