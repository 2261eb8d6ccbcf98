"""Variance of a module's inputs that their leading directions explain, by which EVA (arXiv 2410.07170) distributes ranks.

The directions come from PEFT's incremental principal component analysis, so that the values are those of PEFT's EVA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def explained_variance(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], windows_NT: Tensor, ranks: Sequence[int], batch: int = 4
) -> dict[str, tuple[float, ...]]:
    """Returns, for each module and rank r, the share of the variance of its inputs that r directions explain.

    Args:
        model: The model in evaluation mode.
        modules: Modules by name; modules that read the same tensor share one decomposition.
        windows_NT: Tokens, int64 (windows, tokens).
        ranks: Ranks, ascending.
        batch: Number of windows in one forward pass; a pass needs at least as many tokens as the largest rank.

    Returns:
        Module name to one share for each rank.
    """
    found: dict[str, IncrementalPCA] = {}
    source: dict[str, str] = {}
    for chunk in windows_NT.split(batch):
        for reader, (name, inputs) in _inputs(model, modules, chunk).items():
            source[reader] = name
            if reader == name:
                flat = inputs.flatten(0, -2).float()
                pca = found.setdefault(name, IncrementalPCA(n_components=min(max(ranks), *flat.shape), copy=True))
                if len(flat) >= (pca.n_components or 1):
                    pca.partial_fit(flat)
    return {name: _shares(found[source[name]], ranks) for name in modules}


def _inputs(model: PreTrainedModel, modules: Mapping[str, nn.Module], ids: Tensor) -> dict[str, tuple[str, Tensor]]:
    """Returns, for each module, its input tensor and the name of the first module that read the same tensor in this pass."""
    seen: dict[str, tuple[str, Tensor]] = {}
    first: dict[int, str] = {}

    def reading(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            tensor: Tensor = arguments[0]
            # The tensors are referenced until the end of the pass, so that no two of them have the same id.
            seen[name] = (first.setdefault(id(tensor), name), tensor)

        return keep

    handles = [module.register_forward_pre_hook(reading(name)) for name, module in modules.items()]
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _shares(pca: IncrementalPCA, ranks: Sequence[int]) -> tuple[float, ...]:
    total = torch.as_tensor(pca.explained_variance_ratio_).double().cumsum(0)
    return tuple(float(total[min(rank, len(total)) - 1]) for rank in ranks)
