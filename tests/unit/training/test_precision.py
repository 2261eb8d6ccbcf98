from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from regraft.training.precision import compute_dtype, trainable_weights

CPU = torch.device("cpu")


def test_the_cpu_computes_in_float32_unless_told() -> None:
    assert compute_dtype("auto", CPU) == compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "compute", "held"),
    [
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_weights_are_held_in_what_trains_and_given_back(
    make_tiny: Callable[..., LlamaForCausalLM], stored: torch.dtype, compute: torch.dtype, held: torch.dtype
) -> None:
    model = make_tiny(tie_word_embeddings=True).to(stored)
    model.model.norm.float()  # one parameter of another type, as some checkpoints have
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with trainable_weights(model, compute):
        assert model.model.layers[0].mlp.up_proj.weight.dtype == held
        assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
