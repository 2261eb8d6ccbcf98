"""The importance of AdaLoRA's triplets: what the model gets back, and that it finds where the gradient is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.data.text import Corpus
from regraft.paired.adalora_importance import triplet_importance
from regraft.settings import RecoverSettings

RANKS = (1, 2, 4)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.slow
def test_triplets_are_summed_largest_first_and_the_model_is_left_as_it_was(
    make_tiny: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    repeating: tuple[Corpus, Corpus],
    quick: Callable[..., RecoverSettings],
) -> None:
    model = make_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    # A projection behind which nothing is read has no gradient: its triplets cannot matter.
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    before["model.layers.1.self_attn.o_proj.weight"].zero_()
    modules = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"]
    state = torch.random.get_rng_state()
    found = [
        triplet_importance(model, tokenizer, repeating[0], modules, RANKS, quick(steps=40, lr=0.01), steps=40, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found[0] == found[1]
    assert found[0] != found[2]
    for scores in found[0].values():
        assert list(scores) == sorted(scores)
        steps = [scores[0], scores[1] - scores[0], (scores[2] - scores[1]) / 2]
        assert steps == sorted(steps, reverse=True), "the largest come first"
    assert found[0][modules[1]][-1] < 0.1 * found[0][modules[0]][-1]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
