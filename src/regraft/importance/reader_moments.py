"""Second moments on both sides of the projections that read heads and feed-forward channels, from one pass forwards and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.numerics.moments import Moments

BATCH_TOKENS = 1024


@dataclass
class ReaderMoments:
    """Second moments on both sides of a projection, from one pass forwards and back.

    Attributes:
        inputs: Second moments C of its inputs.
        outputs: Second moments G of the gradients in its outputs.
    """

    inputs: Moments
    outputs: Moments


def reader_moments(model: PreTrainedModel, names: Iterable[str], windows_NT: Tensor, seed: int) -> dict[str, ReaderMoments]:
    """Returns the moments of every projection, from one pass over the windows.

    Memory in addition to the model: two matrices of second moments for each projection, and the activations of one batch. No gradient of a
    weight is ever formed.

    Args:
        model: The model, in evaluation mode; left as it is.
        names: Names of projections that read heads or feed-forward channels.
        windows_NT: Tokens, int64 (windows, tokens).
        seed: Seed for the tokens that are drawn.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    found: dict[str, ReaderMoments] = {}
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The graph begins at the first projection: nothing before it is asked for a gradient.
            leaving[name] = output if output.requires_grad else output.detach().requires_grad_()
            entering[name] = inputs[0]
            return leaving[name]

        return see

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with float32_on_cpu(model), only_these_train(model, ()):
            for ids_BT in windows_NT.split(max(1, BATCH_TOKENS // windows_NT.shape[1])):
                with torch.enable_grad():
                    drawn = _drawn_likelihood(model, ids_BT.to(model.device), generator)
                    gradients = torch.autograd.grad(drawn, list(leaving.values()))
                for name, gradient_BTO in zip(leaving, gradients, strict=True):
                    rows_BTI = entering[name].detach()
                    if name not in found:
                        found[name] = ReaderMoments(
                            Moments.empty(rows_BTI.shape[-1], rows_BTI.device), Moments.empty(gradient_BTO.shape[-1], rows_BTI.device)
                        )
                    found[name].inputs.add(rows_BTI)
                    found[name].outputs.add(gradient_BTO)
                entering.clear()
                leaving.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _drawn_likelihood(model: PreTrainedModel, ids_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the summed log-likelihood of one token drawn from every prediction."""
    logits_NV = model(input_ids=ids_BT, use_cache=False).logits.float().flatten(0, 1)
    with torch.no_grad():
        drawn_N = torch.multinomial(functional.softmax(logits_NV, dim=-1), 1, generator=generator).squeeze(1)
    return -functional.cross_entropy(logits_NV, drawn_N, reduction="sum")
