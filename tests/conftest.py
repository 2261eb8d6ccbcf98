"""Tiny random models that every test can make in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**SIZES, **kw)),
    "llama-bias": lambda **kw: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **kw)),
    "mistral": lambda **kw: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, **kw)),
    "mistral-window": lambda **kw: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8, **kw)),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**SIZES, **kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**SIZES, **kw)),
}


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Returns ``make(family, **config)``: a random model whose biases and norms are not trivial."""

    def make(family: str = "llama", **config: Any) -> PreTrainedModel:
        model = FAMILIES[family](**config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("bias"):
                    parameter.copy_(0.1 * noise)
                elif "norm" in name:
                    parameter.copy_(1.0 + 0.1 * noise)
                else:
                    parameter.copy_(0.15 * noise)
        return model

    return make


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family and variant in turn."""
    return request.param
