"""Moments of the inputs and of the output gradients of a model's linear layers, which compression methods use as evidence.

One pass of the calibration text, forwards and, where gradients are asked for, back. Moments are float64 and quadratic in the widths; layers
that read the same tensor share theirs, and where all together would take too much, several passes each watch a part of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class Watcher:
    """Hooks on layers that keep what enters and leaves them in one forward pass, and the moments of all passes.

    Args:
        modules: The layers by full name, in the order in which the model calls them.
        groups: Groups of windows, within which covariances are taken.
        with_gradients: Whether moments of the gradients at the outputs are collected too.

    Attributes:
        inputs: Moments of each tensor, under the name of the first layer that reads it.
        reads: Key of the inputs of each layer in ``inputs``.
        gradients: Moments of the gradients at the outputs, by layer.
    """

    def __init__(self, modules: Mapping[str, nn.Module], groups: int, *, with_gradients: bool) -> None:
        self.inputs: dict[str, PooledMoments] = {}
        self.reads: dict[str, str] = {}
        self.gradients: dict[str, Moments] = {}
        self._modules = modules
        self._groups = groups
        self._with_gradients = with_gradients
        self._entering: dict[str, Tensor] = {}
        self._leaving: dict[str, Tensor] = {}

    def __enter__(self) -> Watcher:
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._entering.clear()
        self._leaving.clear()

    @property
    def outputs(self) -> list[Tensor]:
        """Outputs of the layers in the last pass, for gradients with respect to it, in the order of the layers."""
        return list(self._leaving.values())

    def add_inputs(self, group: int, batch: int) -> None:
        """Adds what entered the layers in the last pass.

        Raises:
            InputError: It holds NaN or infinity; the message names the layer and the batch.
        """
        if not self.reads:
            first: dict[int, str] = {}
            self.reads = {name: first.setdefault(rows.data_ptr(), name) for name, rows in self._entering.items()}
        for name in dict.fromkeys(self.reads.values()):
            rows = self._entering[name]
            refuse_strange(rows, f"inputs of '{name}'", batch)
            if name not in self.inputs:
                self.inputs[name] = PooledMoments.empty(rows.shape[-1], self._groups, rows.device)
            self.inputs[name].add(rows, group)
        self._entering.clear()

    def add_gradients(self, gradients: Sequence[Tensor], batch: int) -> None:
        """Adds gradients with respect to :attr:`outputs`.

        Raises:
            InputError: They hold NaN or infinity; the message names the layer and the batch.
        """
        for name, gradient in zip(self._leaving, gradients, strict=True):
            refuse_strange(gradient, f"gradients at the outputs of '{name}'", batch)
            if name not in self.gradients:
                self.gradients[name] = Moments.empty(gradient.shape[-1], gradient.device)
            self.gradients[name].add(gradient)
        self._leaving.clear()

    def evidence(self, name: str, weight_OI: Tensor) -> Evidence:
        """Returns what was seen of a layer."""
        return Evidence(name, weight_OI, self.inputs[self.reads[name]], self.gradients.get(name))

    def _hook(self, name: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self._entering[name] = inputs[0].detach()
            if not self._with_gradients:
                return None
            if not output.requires_grad:  # the lowest layers that are watched: nothing below them is asked for
                output = output.detach().requires_grad_()
            self._leaving[name] = output
            return output

        return see


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
        model: The model, in evaluation mode; left as it is.
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
        yield from (Evidence(name, weight_of(module, transposed)) for name, module in projections.items())
        return
    assert windows_NT is not None
    for part in in_parts(projections, looks_at, transposed, most_bytes):
        seen = _watch(model, part, windows_NT, looks_at, seed)
        for name, module in part.items():
            yield seen.evidence(name, weight_of(module, transposed))


def grouped_batches(windows_NT: Tensor) -> list[tuple[int, Tensor]]:
    """Returns batches of windows, none of which crosses from one group into the next, each with the number of its group."""
    groups = min(GROUPS, len(windows_NT))
    bounds = [round(index * len(windows_NT) / groups) for index in range(groups + 1)]
    return [(index, batch) for index in range(groups) for batch in windows_NT[bounds[index] : bounds[index + 1]].split(BATCH)]


def uniforms(windows_NT: Tensor, seed: int) -> Tensor:
    """Returns a number from 0 to 1 for every token, float64 (windows, tokens), by which a token is drawn from the prediction there.

    It depends on the place of the token alone, so that batches and blocks of the vocabulary of any size draw the same.
    """
    return torch.rand(windows_NT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_log_likelihood(logits_BTV: Tensor, uniforms_BT: Tensor) -> Tensor:
    """Returns the summed log-likelihood of one token drawn from each prediction; its gradients are those of the Fisher information.

    The token is the first at which the cumulated probability exceeds the uniform number.
    """
    rows_NV = functional.log_softmax(logits_BTV.flatten(0, 1).float(), dim=-1)
    cumulated_NV = rows_NV.detach().exp().cumsum(dim=-1, dtype=torch.float64)
    tokens_N1 = (cumulated_NV <= uniforms_BT.reshape(-1, 1).to(cumulated_NV.device)).sum(dim=-1, keepdim=True)
    return rows_NV.gather(1, tokens_N1.clamp_max(rows_NV.shape[1] - 1)).sum()


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


def in_parts(projections: Mapping[str, nn.Module], looks_at: LooksAt, transposed: bool, most_bytes: int) -> Iterator[dict[str, nn.Module]]:
    """Yields layers in parts whose moments fit into memory, at least one in a part."""
    part: dict[str, nn.Module] = {}
    total = 0
    for name, module in projections.items():
        rows, columns = weight_of(module, transposed).shape
        needed = moment_bytes(rows, columns, looks_at)
        if part and total + needed > most_bytes:
            yield part
            part, total = {}, 0
        part[name] = module
        total += needed
    if part:
        yield part


def _watch(model: PreTrainedModel, part: Mapping[str, nn.Module], windows_NT: Tensor, looks_at: LooksAt, seed: int) -> Watcher:
    batches, with_gradients = grouped_batches(windows_NT), looks_at == "gradients"
    chances_NT, first = uniforms(windows_NT, seed), 0
    with (
        Watcher(part, 1 + batches[-1][0], with_gradients=with_gradients) as watcher,
        float32_on_cpu(model),
        only_these_train(model, ()),
        torch.set_grad_enabled(with_gradients),
    ):
        for number, (group, ids) in enumerate(batches, 1):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            watcher.add_inputs(group, number)
            if with_gradients:
                likelihood = drawn_log_likelihood(logits, chances_NT[first : first + len(ids)])
                watcher.add_gradients(torch.autograd.grad(likelihood, watcher.outputs), number)
            first += len(ids)
    return watcher


def weight_of(module: nn.Module, transposed: bool) -> Tensor:
    """Returns the weight of a linear layer, (out, in); ``transposed`` says whether it is stored (in, out)."""
    weight = module.get_parameter("weight").detach()
    return weight.T if transposed else weight
