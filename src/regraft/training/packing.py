"""Whether records that share a row are blind to each other in a given model."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel


def is_blind_to_neighbours(model: PreTrainedModel) -> bool:
    """Returns whether a model reads two records in one row, told apart by their positions alone, as it reads each by itself.

    It is tried, on eight tokens: models differ in whether they take positions and whether their attention mask is made from them.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.tensor([3, 1, 2, 0, 2, 0, 3, 1], device=model.device)
    positions = torch.cat([torch.arange(4), torch.arange(4)]).to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        together = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0, 4:].float()
        alone = model(input_ids=ids[None, 4:], use_cache=False).logits[0].float()
    model.train(was_training)
    return torch.allclose(together, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max()))
