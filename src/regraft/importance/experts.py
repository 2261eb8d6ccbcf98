"""Scores of experts by what they add to the stream when they are chosen: REAP.

The score of expert j is the mean, over the tokens that are sent to it, of its router weight times the norm of its output:
``S_j = mean_t g_j(x_t) ||f_j(x_t)||`` (Lasby et al., REAP the Experts, arXiv 2510.13999, equation 9). An expert that is never chosen has
score 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.groups.experts import Experts, experts_of
from regraft.models.live import resting
from regraft.plans import Scores

NAME = "reap"


@torch.no_grad()
def score_experts(model: PreTrainedModel, fingerprint: str, windows_NT: Tensor, batch: int = 8) -> Scores:
    """Returns the score of every expert.

    Args:
        model: A model with experts; it is left as it is.
        fingerprint: Its fingerprint.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        batch: Number of windows in one forward pass.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    busy: list[bool] = []

    def watch(experts: Experts) -> Any:
        name = f"layers.{experts.layer}.experts"
        sums[name], counts[name] = (torch.zeros(experts.count, dtype=torch.float64) for _ in range(2))

        def see(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if busy:
                return
            busy.append(True)  # the module is called again below, for one expert at a time
            hidden, chosen, weights = _routed(inputs, named)
            for expert in range(experts.count):
                tokens, place = (chosen == expert).nonzero(as_tuple=True)
                if len(tokens):
                    alone = torch.full((len(tokens), 1), expert, device=chosen.device, dtype=chosen.dtype)
                    output = module(hidden[tokens], alone, torch.ones_like(alone, dtype=weights.dtype))
                    norms = output.to(torch.float64).norm(dim=-1)
                    sums[name][expert] += (weights[tokens, place].to(torch.float64) * norms).sum().cpu()
                    counts[name][expert] += len(tokens)
            busy.clear()

        return experts.module.register_forward_pre_hook(see, with_kwargs=True)

    handles = [watch(experts) for experts in experts_of(model)]
    try:
        with resting(model):
            for ids in windows_NT.split(batch):
                model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    values = {name: tuple((total / counts[name].clamp(min=1)).tolist()) for name, total in sums.items()}
    return Scores(fingerprint, NAME, values)


def _routed(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden states (tokens, width), chosen experts (tokens, chosen) and their weights, from a call of the stacked experts."""
    hidden, chosen, weights = (*inputs, *named.values())[:3]
    return hidden.reshape(-1, hidden.shape[-1]), chosen, weights
