"""Second moments on both sides of the projections that read heads and feed-forward channels, from one pass forwards and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from regraft.models.layerwise import stopped_at, watched_inputs
from regraft.models.precision import float32_on_cpu
from regraft.models.trainable import only_these_train
from regraft.numerics.moments import Moments, adder

BATCH_TOKENS = 1024
# A batch with gradients keeps the activations of all layers, and its logits several times over.
GRADIENT_BATCH_TOKENS = 512
# Gradients cost more than inputs, and their moments, of a narrower side, need fewer tokens.
FEWEST_GRADIENTS, GRADIENT_SHARE = 8, 4


@dataclass
class ReaderMoments:
    """Second moments on both sides of a projection, from one pass forwards and back.

    Attributes:
        inputs: Second moments C of its inputs.
        outputs: Second moments G of the gradients in its outputs, from a quarter of the windows, or from eight of them.
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
    readers = {name: model.get_submodule(name) for name in names}
    if not readers:  # the residual width alone is cut
        return {}
    generator = torch.Generator(model.device).manual_seed(seed)
    inputs: dict[str, Moments] = {}
    outputs: dict[str, Moments] = {}
    per_batch, per_graph = (max(1, tokens // windows_NT.shape[1]) for tokens in (BATCH_TOKENS, GRADIENT_BATCH_TOKENS))
    drawn = max(FEWEST_GRADIENTS, len(windows_NT) // GRADIENT_SHARE)
    last = ""
    with float32_on_cpu(model), only_these_train(model, ()), watched_inputs(readers, adder(inputs)):
        for ids_BT in windows_NT[:drawn].split(per_graph):
            with _graph_from(readers) as leaving, torch.enable_grad():
                likelihood = _drawn_likelihood(model, ids_BT.to(model.device), generator)
                gradients = torch.autograd.grad(likelihood, list(leaving.values()))
            for name, gradient_BTO in zip(leaving, gradients, strict=True):
                adder(outputs)(name, gradient_BTO)
                last = name
        for ids_BT in windows_NT[drawn:].split(per_batch) if len(windows_NT) > drawn else ():
            with torch.no_grad(), stopped_at(readers[last]):
                model(input_ids=ids_BT.to(model.device), use_cache=False)
    return {name: ReaderMoments(inputs[name], outputs[name]) for name in readers}


@contextmanager
def _graph_from(readers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yields the outputs of the readers in the order in which they ran; the graph begins at the first of them."""
    leaving: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def see(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            leaving[name] = output if output.requires_grad else output.detach().requires_grad_()
            return leaving[name]

        return see

    handles = [reader.register_forward_hook(watch(name)) for name, reader in readers.items()]
    try:
        yield leaving
    finally:
        for handle in handles:
            handle.remove()


def _drawn_likelihood(model: PreTrainedModel, ids_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the summed log-likelihood of one token drawn from every prediction."""
    logits_NV = model(input_ids=ids_BT, use_cache=False).logits.float().flatten(0, 1)
    with torch.no_grad():
        drawn_N = torch.multinomial(functional.softmax(logits_NV, dim=-1), 1, generator=generator).squeeze(1)
    return -functional.cross_entropy(logits_NV, drawn_N, reduction="sum")
