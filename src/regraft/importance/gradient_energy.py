"""Energy of the best low-rank approximations of a weight's gradient: the part that a few ranks can learn in the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.importance.passes import mean_gradients
from regraft.numerics.svd import randomized_triplets

_DENSE_SIDE = 512  # up to here a full decomposition is as fast as a sketched one


def gradient_energy(
    model: PreTrainedModel, weights: Mapping[str, Tensor], windows_NT: Tensor, ranks: Sequence[int], generator: torch.Generator
) -> dict[str, tuple[float, ...]]:
    r"""Returns, for each weight and rank r, the energy :math:`\sum_{i \le r} \sigma_i(G)^2` of the loss's mean gradient G.

    A gradient step along the best rank-r approximation of G lowers the loss by this energy times the learning rate, to first order.

    Args:
        model: The model; it is restored at the end.
        weights: Matrices by name, parameters of the model.
        windows_NT: Tokens, int64 (windows, tokens).
        ranks: Ranks, ascending; a rank above the sides of a matrix gives all of its energy.
        generator: A generator on the CPU, for the randomised decomposition of large matrices.

    Returns:
        Name of the weight to one number for each rank, in nats squared over the squared unit of the weights.
    """
    gradients, _ = mean_gradients(model, weights, windows_NT, squares=False)
    return {name: _energies(gradient, ranks, generator) for name, gradient in gradients.items()}


def _energies(gradient: Tensor, ranks: Sequence[int], generator: torch.Generator) -> tuple[float, ...]:
    side = min(gradient.shape)
    largest = min(max(ranks), side)
    if side <= _DENSE_SIDE:
        values = torch.linalg.svdvals(gradient.double())
    else:
        values = randomized_triplets(gradient.double(), largest, generator).values
    energy = values.square().cumsum(0)
    return tuple(float(energy[min(rank, largest) - 1]) for rank in ranks)
