"""Second re-fitting of the projections that read pruned channels, all together, to the predictions of the dense model.

Least squares, layer by layer (:mod:`regraft.surgery.refit_layerwise`), restores the output of each projection separately. The goal,
however, is a small change of the model's predictions: the Kullback-Leibler divergence from the dense model. After least squares, a few
steps along the natural gradient (:mod:`regraft.numerics.natural_gradient`) reduce this divergence, in all reading projections at once,
including those of layers that were not cut.

This is a fit to the calibration windows, not a training: there are no labels, no learning rate and no optimizer state. Each step takes one
forward pass of both models and one backward pass of the pruned one. The step length is halved until the divergence falls on windows that
the gradients did not use; if no length helps, the fit ends. Second moments are those of the first step, and the outputs of the dense
model's last layer are kept, so that only its head runs again. In addition to both models it needs memory for a gradient and two
matrices of second moments for each reading projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft.models.layerwise import layers_give
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, summed_divergence
from regraft.numerics.moments import Moments, adder
from regraft.numerics.natural_gradient import natural_gradient
from regraft.progress import Say, Step, say_nothing

STEPS = 4
# Limit for the held-out windows. Every step length that is tried runs all of them, and more windows improve the choice too little.
JUDGED_WINDOWS = 16
_BATCH_WINDOWS = 4  # logits of a batch, with its gradients, are there several times over
_HALVINGS = 8
# The Fisher information is estimated from this share of the windows: its matrices are narrow, and it only shapes the step.
_DRAWN_SHARE = 4


def refit_to_predictions(
    pruned: ModelView,
    dense: PreTrainedModel,
    windows_NT: Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
    least_gain: float = 0.0,
    say: Say = say_nothing,
) -> list[float]:
    """Re-fits the reading projections of a pruned model in place.

    Args:
        pruned: The pruned model.
        dense: The model before the cut; it is not changed.
        windows_NT: Calibration tokens, int64 (windows, tokens); a quarter of them, 1 to 16, is held out.
        steps: Largest number of steps.
        seed: Seed of the tokens drawn from the pruned model's predictions, which estimate the Fisher information.
        least_gain: A step that lessens the divergence by a smaller share than this is the last one.
        say: Called with one line for each step.

    Returns:
        Divergence on the held-out windows, in nats a token: before the first step, and after each step.

    Raises:
        InputError: A gradient is not finite.
    """
    judges = max(1, min(JUDGED_WINDOWS, len(windows_NT) // 4))
    fitted = (windows_NT[:-judges] if len(windows_NT) > 1 else windows_NT).to(pruned.model.device).split(_BATCH_WINDOWS)
    judged = windows_NT[-judges:].to(pruned.model.device).split(_BATCH_WINDOWS)
    readers, transposed = reading_projections(pruned), pruned.family.transposed
    generator = torch.Generator(pruned.model.device).manual_seed(seed)
    for reader in readers.values():  # a weight that was not cut may be shared with the dense model
        reader.register_parameter("weight", nn.Parameter(_weight(reader).detach().clone()))
    stored = {name: _weight(reader).dtype for name, reader in readers.items()}
    length, aim, judging = 1.0 / max(1, len(readers)), _Aim(dense), _Aim(dense)
    training = only_these_train(pruned.model, [_weight(reader) for reader in readers.values()])
    with float32_on_cpu(pruned.model), float32_on_cpu(dense), training, torch.no_grad():
        metrics: _Metrics | None = None

        def divergence() -> float:
            batches = enumerate(judged)
            total = sum(float(summed_divergence(_log_probabilities(pruned.model, ids), judging.of(place, ids))) for place, ids in batches)
            return total / windows_NT[-judges:].numel()

        found = [divergence()]
        for step in range(steps):
            metrics, fresh = (_Metrics({}, {}), generator) if metrics is None else (metrics, None)
            gradients = _gather(pruned.model, aim, readers, fitted, metrics, fresh)
            directions = {name: metrics.direction(name, gradient.T if transposed else gradient) for name, gradient in gradients.items()}
            taken, reached = _search(readers, stored, directions, length, divergence, found[-1], transposed)
            if taken is None:
                break
            found.append(reached)
            length = 2.0 * taken
            say(Step(f"re-fitting to the dense model's predictions, divergence {found[0]:.4f} -> {reached:.4f} nats", step + 1, steps))
            if found[-2] - reached < least_gain * found[-2]:
                break
    return found


def refitting_bytes(view: ModelView) -> int:
    """Returns the memory that :func:`refit_to_predictions` needs in addition to both models.

    For each reading projection these are the second moments of its inputs and of the gradients with respect to its outputs, a gradient and
    a direction, all in float64, and two copies of the weight.
    """
    total = 0
    for reader in reading_projections(view).values():
        weight = _weight(reader)
        rows, columns = weight.shape
        total += 8 * (rows * rows + columns * columns + 2 * rows * columns) + 2 * weight.element_size() * rows * columns
    return total


def reading_projections(view: ModelView) -> dict[str, nn.Module]:
    """Returns the projections that read heads or feed-forward channels, by full name, in the order of the layers."""
    found: dict[str, nn.Module] = {}
    for layer in range(len(view.layers)):
        for axis in (axis for coupling in view.family.couplings for axis in coupling.axes if axis.side == "in"):
            module = view.module(layer, axis.module)
            if module is not None:
                found[f"{view.layer_name(layer)}.{axis.module}"] = module
    return found


def _search(
    readers: Mapping[str, nn.Module],
    stored: Mapping[str, torch.dtype],
    directions: Mapping[str, Tensor],
    length: float,
    divergence: Callable[[], float],
    before: float,
    transposed: bool,
) -> tuple[float | None, float]:
    """Searches the step length along the directions by halving, while that reduces the divergence.

    Weights are rounded to their ``stored`` dtypes before each evaluation, so that the evaluated model is the one that is saved.

    Returns:
        The length and its divergence. The length is None, and the weights are unchanged, if no length helps.
    """
    starts = {name: _weight(reader).detach().clone() for name, reader in readers.items()}

    def go(by: float) -> None:
        for name, reader in readers.items():
            direction = directions[name].T if transposed else directions[name]
            _weight(reader).copy_((starts[name].double() - by * direction).to(stored[name]))

    best, reached = None, before
    for _ in range(_HALVINGS):
        go(length)
        now = divergence()
        if now < reached:
            best, reached = length, now
        elif best is not None:
            break
        length *= 0.5
    go(best or 0.0)
    return best, reached


@dataclass(frozen=True)
class _Metrics:
    """Second moments of the inputs of projections, and of the gradients in their outputs, by name; empty before the first step."""

    inputs: dict[str, Moments]
    outputs: dict[str, Moments]

    def direction(self, name: str, gradient_OI: Tensor) -> Tensor:
        """Returns the natural gradient of a projection, float64 (out, in)."""
        return natural_gradient(gradient_OI, self.inputs[name].second_DD, self.outputs[name].second_DD)


class _Aim:
    """Predictions of the dense model, batch by batch: after the first time from the kept outputs of its last layer.

    Args:
        model: The dense model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._view = ModelView(model)
        self._last: dict[int, Tensor] = {}

    def of(self, batch: int, ids_BT: Tensor) -> Tensor:
        """Returns log-probabilities, float32 (batch, tokens, vocabulary), of the batch with this number."""
        if batch in self._last:
            with layers_give(self._view, self._last[batch]):
                return _log_probabilities(self._view.model, ids_BT)

        def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            self._last[batch] = output[0] if isinstance(output, tuple) else output

        handle = self._view.layers[-1].register_forward_hook(keep)
        try:
            return _log_probabilities(self._view.model, ids_BT)
        finally:
            handle.remove()


def _gather(
    model: PreTrainedModel,
    aim: _Aim,
    readers: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    metrics: _Metrics,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Returns for each projection the gradient of the mean divergence, float64 of the weight's shape.

    With a generator it also fills ``metrics``: the moments of the projections' inputs and, from a part of the batches, of the gradients
    with respect to their outputs, for the log-likelihood of tokens drawn from the model's predictions.
    """
    gradients: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    weights = {name: _weight(reader) for name, reader in readers.items()}
    tokens = sum(ids.numel() for ids in batches)
    see_input = adder(metrics.inputs)

    def watch(name: str) -> Callable[..., None]:
        def see(_module: nn.Module, entering: tuple[Tensor, ...], leaving: Tensor) -> None:
            see_input(name, entering[0].detach())
            outputs[name] = leaving

        return see

    watched = readers if generator is not None else {}
    handles = [reader.register_forward_hook(watch(name)) for name, reader in watched.items()]
    try:
        for place, ids in enumerate(batches):
            drawing = generator is not None and place < max(1, len(batches) // _DRAWN_SHARE)
            dense_BTV = aim.of(place, ids)
            with torch.enable_grad():
                now = _log_probabilities(model, ids)
                loss = summed_divergence(now, dense_BTV) / tokens
                found = torch.autograd.grad(loss, list(weights.values()), retain_graph=drawing)
                if drawing:
                    assert generator is not None
                    _add_drawn(metrics.outputs, outputs, now, generator)
            outputs.clear()
            for name, gradient in zip(weights, found, strict=True):
                gradients[name] = gradients[name] + gradient.double() if name in gradients else gradient.double()
    finally:
        for handle in handles:
            handle.remove()
    return gradients


def _add_drawn(drawn: dict[str, Moments], outputs: Mapping[str, Tensor], now_BTV: Tensor, generator: torch.Generator) -> None:
    """Draws a token from every prediction; adds the gradients of the log-likelihood with respect to the outputs, a row for each token."""
    rows_NV = now_BTV.flatten(0, 1)
    see = adder(drawn)
    tokens_N1 = torch.multinomial(rows_NV.detach().exp(), 1, generator=generator)
    for name, gradient in zip(outputs, torch.autograd.grad(rows_NV.gather(1, tokens_N1).sum(), list(outputs.values())), strict=True):
        see(name, gradient)


def _weight(reader: nn.Module) -> nn.Parameter:
    return reader.get_parameter("weight")


def _log_probabilities(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Returns the log-probabilities of all tokens, float32 (batch, tokens, vocabulary)."""
    return log_probabilities(model(input_ids=ids_BT, use_cache=False).logits)
