"""Tiny models that are made in milliseconds: a Llama of three layers, and one module of each kind that adapters know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from regraft.adapters import Evidence

VOCABULARY, TOKENS = 40, 12
LAYERS = {"linear": "up_proj", "conv1d": "c_proj", "embedding": "embed_tokens"}
"""Kinds of modules of :class:`Toy`, and the last part of their names."""
FULL_NAMES = {"linear": "layers.0.up_proj", "conv1d": "layers.0.c_proj", "embedding": "embed_tokens"}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Returns a random Llama: 3 layers, width 48, 6 query heads of 8 on 3 key-value heads, 64 feed-forward channels, 97 tokens."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.1 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def windows(count: int = 4, tokens: int = 16, seed: int = 3) -> Tensor:
    """Returns int64 (count, tokens) of random token ids of :func:`tiny_llama`."""
    return torch.randint(3, 97, (count, tokens), generator=torch.Generator().manual_seed(seed))


class ToyConfig(PreTrainedConfig):
    """Config of :class:`Toy`, whose sizes are fixed."""

    model_type = "toy"


class ToyLayer(nn.Module):
    """A linear layer and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(24, 32)
        self.c_proj = Conv1D(20, 32)


class Toy(PreTrainedModel):
    """Embedding 40 x 24, Linear 24 to 32, Conv1D 32 to 20, head 20 to 40."""

    config_class = ToyConfig
    _no_split_modules = ()  # pyright: ignore[reportAssignmentType]

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, 24)
        self.layers = nn.ModuleList([ToyLayer()])
        self.lm_head = nn.Linear(20, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: object) -> CausalLMOutput:
        """Returns logits (batch, tokens, 40), and the mean cross entropy to the labels where there are labels."""
        layer: Any = self.layers[0]
        hidden = layer.c_proj(torch.nn.functional.silu(layer.up_proj(self.embed_tokens(input_ids))))
        logits = self.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) if labels is not None else None
        return CausalLMOutput(loss=loss, logits=logits)


def toy(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Toy:
    """Returns the model with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Toy(ToyConfig())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    placed: Any = model
    return placed.to(device=device, dtype=dtype).eval()


def batch(device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Returns input ids and labels, int64 (4, 12) each."""
    ids = torch.randint(0, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids.flip(1)}


def evidence(device: str = "cpu") -> Evidence:
    """Returns what adapters may look at before they begin: batches of the toy."""
    return Evidence(lambda count: [batch(device, seed) for seed in range(count)])


def logits(model: nn.Module, device: str = "cpu") -> Tensor:
    """Returns the float32 logits of the first batch, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=batch(device)["input_ids"]).logits.float()
