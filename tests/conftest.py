"""Tiny random models that every test can make in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

# A command writes the page of its result, which takes a second; tests of the page switch it on by --report.
os.environ["REGRAFT_REPORT"] = "0"

# The same examples in every run: what a run finds can be found again.
hypothesis.settings.register_profile("regraft", derandomize=True, deadline=None)
hypothesis.settings.load_profile("regraft")

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
    "llama-bias": lambda **kw: LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **(SIZES | kw))),
    "mistral": lambda **kw: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, **kw)),
    "mistral-window": lambda **kw: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8, **kw)),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**SIZES, **kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**SIZES, **kw)),
}

# The same sizes for families whose configs know fewer of them: head size = hidden size / heads, and often one key-value head each.
_BARE: dict[str, Any] = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads", "intermediate_size")}
_GROUPED: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "head_dim"}
_BLOOM: dict[str, Any] = {key: value for key, value in _BARE.items() if key != "max_position_embeddings"}
_WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
_LOCAL: dict[str, Any] = {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 8}
_SEQUENTIAL: dict[str, Any] = {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
_SMALL_EMBEDDING: dict[str, Any] = {"word_embed_proj_dim": 24, "do_layer_norm_before": False}

MORE_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "bloom": lambda **kw: BloomForCausalLM(BloomConfig(**_BLOOM, **kw)),
    "falcon": lambda **kw: FalconForCausalLM(FalconConfig(**_BARE, num_kv_heads=1, **kw)),
    "falcon-grouped": lambda **kw: FalconForCausalLM(FalconConfig(**_BARE, num_kv_heads=3, new_decoder_architecture=True, **kw)),
    "falcon-alibi": lambda **kw: FalconForCausalLM(FalconConfig(**_BARE, **_SEQUENTIAL, **kw)),
    "gemma2": lambda **kw: Gemma2ForCausalLM(Gemma2Config(**SIZES, **_WINDOWS, **kw)),
    "gemma3": lambda **kw: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **_WINDOWS, **kw)),
    "gpt2": lambda **kw: GPT2LMHeadModel(GPT2Config(**_BARE, n_inner=64, **kw)),
    "gpt_bigcode": lambda **kw: GPTBigCodeForCausalLM(GPTBigCodeConfig(**_BARE, n_inner=64, **kw)),
    "gpt_bigcode-heads": lambda **kw: GPTBigCodeForCausalLM(GPTBigCodeConfig(**_BARE, n_inner=64, multi_query=False, **kw)),
    "gpt_neo": lambda **kw: GPTNeoForCausalLM(GPTNeoConfig(**_BARE, **_LOCAL, intermediate_size=64, **kw)),
    "gpt_neox": lambda **kw: GPTNeoXForCausalLM(GPTNeoXConfig(**_BARE, intermediate_size=64, **kw)),
    "gpt_neox-sequential": lambda **kw: GPTNeoXForCausalLM(GPTNeoXConfig(**_BARE, intermediate_size=64, use_parallel_residual=False, **kw)),
    "olmo2": lambda **kw: Olmo2ForCausalLM(Olmo2Config(**_GROUPED, **kw)),
    "opt": lambda **kw: OPTForCausalLM(OPTConfig(**_BARE, ffn_dim=64, **kw)),
    "opt-350m": lambda **kw: OPTForCausalLM(OPTConfig(**_BARE, **_SMALL_EMBEDDING, ffn_dim=64, **kw)),
    "phi3": lambda **kw: Phi3ForCausalLM(Phi3Config(**_GROUPED, pad_token_id=0, **kw)),
    "stablelm": lambda **kw: StableLmForCausalLM(StableLmConfig(**_GROUPED, **kw)),
    "stablelm-parallel": lambda **kw: StableLmForCausalLM(StableLmConfig(**_GROUPED, use_parallel_residual=True, use_qkv_bias=True, **kw)),
    "starcoder2": lambda **kw: Starcoder2ForCausalLM(Starcoder2Config(**_GROUPED, **kw)),
}


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def random_model(family: str = "llama", **config: Any) -> PreTrainedModel:
    """Returns a random model whose biases and norms are not trivial."""
    model = (FAMILIES | MORE_FAMILIES)[family](**config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "norm" in name or ".ln_" in name:
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Returns ``make(family, **config)``: a random model whose biases and norms are not trivial."""
    return random_model


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family and variant of the Llama kind in turn."""
    return request.param


@pytest.fixture(params=sorted(FAMILIES | MORE_FAMILIES))
def any_family(request: pytest.FixtureRequest) -> str:
    """Every family and variant in turn."""
    return request.param
