"""An importance matrix: the mean square of the inputs of each matrix, channel by channel, over a text.

A rounding error in column j of a matrix costs in proportion to E[x_j²]; llama.cpp's quantiser chooses the scales of its blocks
by errors so weighted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regraft.data.text import read_corpus
from regraft.data.tokens import calibration_windows, context_limit
from regraft.models.load import Loaded, require_tokenizer

SAMPLES, TOKENS = 32, 128

Importance = Mapping[str, np.ndarray]
"""By the name of a module, the mean square of each of its input channels over a text, (in,)."""


def channel_energy(loaded: Loaded, text: Path) -> Importance:
    """Returns the mean square of each input channel of every linear module.

    Args:
        loaded: A model with its tokenizer.
        text: File of the text that it reads.

    Raises:
        DataError: The text cannot be read or is too short.
    """
    tokens = min(TOKENS, context_limit(loaded.model.config) or TOKENS)
    windows = calibration_windows(read_corpus(text, "train"), require_tokenizer(loaded), SAMPLES, tokens, seed=0)
    sums: dict[str, Tensor] = {}
    modules = {name: module for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear | Conv1D)}

    def watching(name: str) -> Any:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy = inputs[0].detach().double().square().flatten(0, -2).sum(0).cpu()
            sums[name] = sums.get(name, torch.zeros_like(energy)) + energy

        return seen

    hooks = [module.register_forward_pre_hook(watching(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            for window in windows:
                loaded.model(input_ids=window[None].to(loaded.model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (energy / windows.numel()).float().numpy() for name, energy in sums.items()}
