from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from regraft.errors import InputError
from regraft.evaluation.size import bytes_in_memory
from regraft.evaluation.speed import compare_speed, measure_speed

MakeModel = Callable[..., PreTrainedModel]


def of_size(hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=97, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(config).eval()


@pytest.mark.slow
def test_a_larger_model_is_slower_and_needs_more_memory() -> None:
    reports = compare_speed({"large": of_size(512, 8), "small": of_size(32, 2)}, 64, 4, repeats=3)
    large, small = reports["large"], reports["small"]
    assert large.prefill_seconds > 2 * small.prefill_seconds > 0
    assert large.decode_seconds_per_token > small.decode_seconds_per_token > 0
    assert large.peak_memory_bytes > small.peak_memory_bytes > 0
    assert (large.prompt_tokens, large.decoded_tokens, large.repeats) == (64, 4, 3)
    assert (large.threads, large.device) == (torch.get_num_threads(), "cpu")
    for one in (large, small):
        assert 0 < one.prefill_low_seconds <= one.prefill_seconds <= one.prefill_high_seconds
        assert 0 < one.decode_low_seconds_per_token <= one.decode_seconds_per_token <= one.decode_high_seconds_per_token
    # By hand: 97 * 512 of the head, and in each of 8 layers 4 projections and 3 of the feed-forward, then the products of attention.
    weights = 97 * 512 + 8 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert large.prefill_flop == 2 * 64 * (weights + 8 * 2 * 512 * 32)
    assert large.decode_bytes == pytest.approx(4 * weights, rel=0.01)  # norms and rotary frequencies are small, the embedding is looked up
    assert 0 < large.prefill_floor_seconds < 2 * large.prefill_high_seconds  # a guess of the machine's rates, on a busy machine
    assert large.confidence == 0.75


@pytest.mark.slow
def test_models_are_measured_in_turns_and_the_first_turn_does_not_count(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"a": make_model("llama"), "b": make_model("qwen2")}
    calls: list[str] = []
    for label, model in models.items():
        original = model.forward

        def spy(*args: object, label: str = label, original: Callable[..., object] = original, **options: object) -> object:
            if options["input_ids"].shape[1] > 1:
                calls.append(label)
                time.sleep(1.0 if calls.count(label) == 1 else 0.05)
            return original(*args, **options)

        monkeypatch.setattr(model, "forward", spy)
    reports = compare_speed(models, 8, 2, repeats=3)
    assert calls == ["a", "b"] * 4 + ["a", "b"]  # a warm-up, three repeats, and a pass for memory
    assert all(0.05 <= report.prefill_seconds < 0.9 for report in reports.values())


@pytest.mark.slow
def test_decoding_uses_the_cache_and_goes_on_greedily(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    read: list[list[int]] = []
    original = model.forward

    def spy(*args: object, **options: object) -> object:
        read.append(options["input_ids"][0].tolist())
        return original(*args, **options)

    monkeypatch.setattr(model, "forward", spy)
    measure_speed(model, 10, 5, repeats=1)
    monkeypatch.undo()
    assert [len(ids) for ids in read[:6]] == [10, 1, 1, 1, 1, 1]
    ids = list(read[0])
    for (token,) in read[1:6]:
        assert token == int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(token)


@pytest.mark.slow
def test_a_passing_need_for_memory_is_seen(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    usual = measure_speed(model, 8, 1, repeats=1).peak_memory_bytes
    original = model.forward

    def hungry(*args: object, **options: object) -> object:
        scratch = torch.ones(100_000_000)  # twice what is asked for below, as earlier tests' memory may be given back meanwhile
        time.sleep(0.05)
        assert scratch[-1] == 1
        return original(*args, **options)

    monkeypatch.setattr(model, "forward", hungry)
    assert measure_speed(model, 8, 1, repeats=1).peak_memory_bytes - usual > 150_000_000


@pytest.mark.long
def test_the_weights_of_other_models_do_not_count() -> None:
    small, large = of_size(32, 1), of_size(1024, 4)
    alone = measure_speed(small, 8, 1, repeats=1).peak_memory_bytes
    together = compare_speed({"small": small, "large": large}, 8, 1, repeats=1)["small"].peak_memory_bytes
    assert bytes_in_memory(large) > 100_000_000
    assert abs(alone - together - bytes_in_memory(large)) < 50_000_000
    twice = compare_speed({"one": large, "same": large}, 8, 1, repeats=1)["one"].peak_memory_bytes
    assert twice > bytes_in_memory(large)


@pytest.mark.slow
def test_lengths_fit_the_context(make_model: MakeModel) -> None:
    model = make_model("llama")
    report = measure_speed(model, repeats=1)
    assert (report.prompt_tokens, report.decoded_tokens) == (48, 16)
    with pytest.raises(InputError, match="60 and 10 generated tokens exceed the model's context of 64"):
        measure_speed(model, 60, 10)
    with pytest.raises(InputError, match="at least 1 of each"):
        measure_speed(model, 0, 10)
    with pytest.raises(InputError, match="0 repeats"):
        measure_speed(model, 8, 1, repeats=0)


@pytest.mark.slow
def test_the_global_generator_is_left_alone(make_model: MakeModel) -> None:
    model, state = make_model("llama"), torch.get_rng_state()
    measure_speed(model, 8, 1, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
