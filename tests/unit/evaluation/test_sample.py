from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from regraft.errors import InputError
from regraft.evaluation.sample import continue_text
from regraft.settings import SampleSettings

Make = Callable[..., PreTrainedTokenizerFast]
MakeModel = Callable[..., PreTrainedModel]


def greedy(model: PreTrainedModel, ids: list[int], tokens: int, eos: int | None = None) -> list[int]:
    """Continues ids without a cache."""
    for _ in range(tokens):
        ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        if ids[-1] == eos:
            break
    return ids


@pytest.mark.slow
def test_the_continuation_is_greedy(make_model: MakeModel, make_tokenizer: Make, family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    expected = tokenizer.decode(greedy(model, tokenizer("Once upon")["input_ids"], 20), skip_special_tokens=True)
    sample = continue_text(model, tokenizer, SampleSettings(prompt="Once upon", tokens=20))
    assert sample == expected
    assert sample.startswith("Once upon")
    assert continue_text(model, tokenizer, SampleSettings(prompt="Once upon", tokens=20)) == sample


def test_an_empty_prompt_starts_from_bos(make_model: MakeModel, make_tokenizer: Make) -> None:
    model = make_model("llama")
    for tokenizer in (make_tokenizer(), make_tokenizer(bos=False)):
        expected = tokenizer.decode(greedy(model, [1], 10, eos=2), skip_special_tokens=True)
        assert continue_text(model, tokenizer, SampleSettings(tokens=10)) == expected
    tokenizer.bos_token = None
    assert continue_text(model, tokenizer, SampleSettings(tokens=10)) == tokenizer.decode(
        greedy(model, [2], 10, eos=2), skip_special_tokens=True
    )
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        continue_text(model, tokenizer)


def test_it_stops_where_the_model_ends_its_text(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    ids = greedy(model, tokenizer("ab")["input_ids"], 20)
    model.generation_config.eos_token_id = [ids[6], 96]
    assert continue_text(model, tokenizer, SampleSettings(prompt="ab", tokens=20)) == tokenizer.decode(
        ids[: ids.index(ids[6], 3) + 1], skip_special_tokens=True
    )


def test_it_stops_at_the_end_of_the_context(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    sample = continue_text(model, tokenizer, SampleSettings(prompt="a" * 60, tokens=48))
    assert sample == tokenizer.decode(greedy(model, tokenizer("a" * 60)["input_ids"], 3), skip_special_tokens=True)
    with pytest.raises(InputError, match="65 tokens and the model's context 64"):
        continue_text(model, tokenizer, SampleSettings(prompt="a" * 64))


@pytest.mark.slow
def test_dropout_and_global_random_state_play_no_part(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama", attention_dropout=0.5), make_tokenizer()
    expected = continue_text(model, tokenizer, SampleSettings(prompt="abc"))
    model.train()
    state = torch.get_rng_state()
    assert continue_text(model, tokenizer, SampleSettings(prompt="abc")) == expected
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
