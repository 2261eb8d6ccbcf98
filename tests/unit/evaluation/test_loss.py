from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from regraft.data.instructions import encode_record
from regraft.data.records import Record
from regraft.data.text import Corpus
from regraft.errors import DataError, InputError, ModelError
from regraft.evaluation.loss import evaluate_loss, window_and_stride
from regraft.settings import EvaluateSettings

Make = Callable[..., PreTrainedTokenizerFast]
MakeModel = Callable[..., PreTrainedModel]
DOCUMENTS = ("Once upon a time there was a cat, a big cat.", "b", "Two dogs ran home\nto eat.", "é" * 5, "a" * 30 + "b" * 33)
CORPUS = Corpus("made up", "test", documents=DOCUMENTS)


def nats_one_by_one(model: PreTrainedModel, ids: list[int], window: int, stride: int) -> list[float]:
    """Predicts every token by a pass of its own, in float64: the context starts at the window that first reaches the token."""
    found = []
    for position in range(len(ids) - 1):
        start = 0 if position < window else stride * math.ceil((position - window + 1) / stride)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start : position + 1]]), use_cache=False).logits[0, -1].double()
        found.append(float(torch.logsumexp(logits, 0) - logits[ids[position + 1]]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 8), (16, 16), (7, 3), (5, 1), (1, 1)])
def test_loss_is_that_of_a_double_loop_in_float64(make_model: MakeModel, make_tokenizer: Make, window: int, stride: int) -> None:
    model, tokenizer = make_model("llama").double(), make_tokenizer()
    expected = [nats_one_by_one(model, tokenizer(text)["input_ids"], window, stride) for text in DOCUMENTS]
    total, tokens = sum(map(sum, expected)), sum(map(len, expected))
    n_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    report = evaluate_loss(model, tokenizer, CORPUS, EvaluateSettings(window=window, stride=stride))
    assert report.loss_nats == pytest.approx(total / tokens, abs=1e-6)
    assert report.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert report.bits_per_byte == pytest.approx(total / math.log(2) / n_bytes, rel=1e-6)
    assert (report.tokens, report.bytes, report.documents) == (tokens, n_bytes, len(DOCUMENTS))
    assert (report.window_tokens, report.stride_tokens, report.bos) == (window, stride, True)
    assert (report.text, report.split) == ("made up", "test")


@pytest.mark.slow
def test_every_family_is_measured_alike(make_model: MakeModel, make_tokenizer: Make, family: str) -> None:
    model, tokenizer = make_model(family), make_tokenizer()
    expected = [nats_one_by_one(model, tokenizer(text)["input_ids"], 20, 10) for text in DOCUMENTS]
    report = evaluate_loss(model, tokenizer, CORPUS, EvaluateSettings(window=20, stride=10))
    assert report.loss_nats == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), abs=1e-5)


def test_a_model_that_knows_nothing_has_the_loss_of_a_fair_die(make_model: MakeModel, make_tokenizer: Make) -> None:
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    report = evaluate_loss(model, make_tokenizer(), CORPUS, EvaluateSettings(window=16))
    assert report.loss_nats == pytest.approx(math.log(97), abs=1e-6)
    assert report.perplexity == pytest.approx(97, rel=1e-6)
    assert report.bits_per_byte == pytest.approx(math.log2(97) * report.tokens / report.bytes, rel=1e-6)


def test_a_model_that_knows_the_order_suffers_when_it_is_shuffled(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama", tie_word_embeddings=False), make_tokenizer()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Each token's embedding, through the final norm, points at the row of the token after it.
        normed = model.model.norm(model.model.embed_tokens.weight)
        model.lm_head.weight.copy_(normed.roll(1, 0))
    letters = "abcdefghijklmnopqrstuvwxyz" * 2
    shuffled = list(letters)
    random.Random(0).shuffle(shuffled)
    settings = EvaluateSettings(bos=False)
    ordered = evaluate_loss(model, tokenizer, Corpus("o", "test", documents=(letters[:26],)), settings)
    mixed = evaluate_loss(model, tokenizer, Corpus("m", "test", documents=("".join(shuffled),)), settings)
    assert ordered.loss_nats < 0.01
    assert mixed.loss_nats > ordered.loss_nats + 5


@pytest.mark.parametrize("batch_windows", [1, 2, 7])
def test_the_size_of_a_batch_does_not_matter(make_model: MakeModel, make_tokenizer: Make, batch_windows: int) -> None:
    model, tokenizer, settings = make_model("llama"), make_tokenizer(), EvaluateSettings(window=12, stride=5)
    automatic = evaluate_loss(model, tokenizer, CORPUS, settings)
    batched = evaluate_loss(model, tokenizer, CORPUS, settings, batch_windows=batch_windows)
    assert batched.loss_nats == pytest.approx(automatic.loss_nats, abs=1e-6)
    assert batched.tokens == automatic.tokens


def test_documents_do_not_see_one_another(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    settings = EvaluateSettings(window=32)
    alone = [evaluate_loss(model, tokenizer, Corpus("d", "test", documents=(text,)), settings) for text in DOCUMENTS]
    together = evaluate_loss(model, tokenizer, CORPUS, settings)
    assert together.tokens == sum(one.tokens for one in alone)
    assert together.loss_nats * together.tokens == pytest.approx(sum(one.loss_nats * one.tokens for one in alone), rel=1e-6)
    backwards = evaluate_loss(model, tokenizer, Corpus("d", "test", documents=DOCUMENTS[::-1]), settings)
    assert backwards.loss_nats == pytest.approx(together.loss_nats, abs=1e-6)


@pytest.mark.slow
def test_only_as_many_tokens_are_predicted_as_asked_for(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    nats = [one for text in DOCUMENTS for one in nats_one_by_one(model, tokenizer(text)["input_ids"], 64, 32)]
    for tokens in (1, 44, 45, 60):
        report = evaluate_loss(model, tokenizer, CORPUS, EvaluateSettings(max_tokens=tokens))
        assert report.tokens == tokens
        assert report.loss_nats == pytest.approx(sum(nats[:tokens]) / tokens, abs=1e-5)
    assert evaluate_loss(model, tokenizer, CORPUS, EvaluateSettings(max_tokens=10**9)).tokens == len(nats)


def test_bos_follows_the_tokenizer_and_can_be_overruled(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, corpus = make_model("llama"), Corpus("t", "test", documents=("ébc",))
    reports = {
        (own, told): evaluate_loss(model, make_tokenizer(bos=own), corpus, EvaluateSettings(bos=told))
        for own in (True, False)
        for told in (True, False, "auto")
    }
    assert {key: (one.bos, one.tokens, one.bytes) for key, one in reports.items()} == {
        (True, True): (True, 3, 4),
        (True, False): (False, 2, 2),
        (True, "auto"): (True, 3, 4),
        (False, True): (True, 3, 4),
        (False, False): (False, 2, 2),
        (False, "auto"): (False, 2, 2),
    }
    assert reports[True, True].loss_nats == reports[False, True].loss_nats


@pytest.mark.slow
def test_a_record_is_measured_on_its_response(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.config.max_position_embeddings = 512
    records = (Record("Say hi.", "", "hi"), Record("Add.", "1 and 2", "3, of course."))
    nats: list[float] = []
    for record in records:
        ids, labels = encode_record(record, tokenizer, 10_000)
        every = nats_one_by_one(model, ids, 512, 256)
        nats += [one for one, label in zip(every, labels[1:], strict=True) if label != -100]
    report = evaluate_loss(model, tokenizer, Corpus("r.json", "all", records=records))
    assert report.tokens == len(nats) == len("hi") + len("3, of course.") + 2
    assert report.loss_nats == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    assert report.text == "r.json (loss on the responses only)"


def test_short_texts_give_a_number_or_say_why_not(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, one = make_model("llama"), Corpus("one.txt", "all", documents=("a",))
    report = evaluate_loss(model, make_tokenizer(), one)
    assert math.isfinite(report.loss_nats)
    assert (report.tokens, report.bytes) == (1, 1)
    with pytest.raises(DataError, match=r"'one.txt' has no token to predict.*`bos=True`"):
        evaluate_loss(model, make_tokenizer(bos=False), one)


def test_window_and_stride_have_defaults_and_limits(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.config.max_position_embeddings = 4096
    assert window_and_stride(model, EvaluateSettings()) == (512, 256)
    model.config.max_position_embeddings = 64
    assert window_and_stride(model, EvaluateSettings()) == (64, 32)
    assert window_and_stride(model, EvaluateSettings(window=1)) == (1, 1)
    with pytest.raises(InputError, match="`window=65` exceeds the model's context of 64 tokens; use at most 64"):
        window_and_stride(model, EvaluateSettings(window=65))
    with pytest.raises(InputError, match="`stride=17` exceeds the window of 16 tokens"):
        window_and_stride(model, EvaluateSettings(window=16, stride=17))


def test_a_loss_that_is_not_finite_is_an_error(make_model: MakeModel, make_tokenizer: Make) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"loss of LlamaForCausalLM is nan.*torch.float32"):
        evaluate_loss(model, make_tokenizer(), CORPUS)


def test_perplexity_does_not_overflow(make_model: MakeModel, make_tokenizer: Make) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    report = evaluate_loss(model, make_tokenizer(), CORPUS)
    assert report.loss_nats > 710
    assert math.isfinite(report.perplexity)


def test_a_tokenizer_of_another_model_is_refused(make_tokenizer: Make, make_model: MakeModel) -> None:
    model = make_model("llama")
    model.resize_token_embeddings(20)
    with pytest.raises(ModelError, match=r"token \d+ but the model's embedding has 20 rows"):
        evaluate_loss(model, make_tokenizer(), CORPUS)


def test_the_model_is_left_as_it_was(make_model: MakeModel, make_tokenizer: Make) -> None:
    model = make_model("llama", attention_dropout=0.5)
    expected = evaluate_loss(model, make_tokenizer(), CORPUS).loss_nats
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    assert evaluate_loss(model, make_tokenizer(), CORPUS).loss_nats == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_ends_at_all_tokens(make_model: MakeModel, make_tokenizer: Make) -> None:
    calls: list[tuple[int, int]] = []
    report = evaluate_loss(
        make_model("llama"), make_tokenizer(), CORPUS, batch_windows=2, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == sorted(calls)
    assert calls[-1] == (report.tokens, report.tokens)
    assert len(calls) == 3


def test_half_precision_is_added_up_in_double(make_model: MakeModel, make_tokenizer: Make) -> None:
    model = make_model("llama")
    full = evaluate_loss(model, make_tokenizer(), CORPUS)
    half = evaluate_loss(model.to(torch.bfloat16), make_tokenizer(), CORPUS)
    assert half.loss_nats == pytest.approx(full.loss_nats, rel=0.02)
    assert half.loss_nats != full.loss_nats


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for a name that transformers changed
def test_an_adapter_counts(make_model: MakeModel, make_tokenizer: Make) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    plain = evaluate_loss(model, tokenizer, CORPUS).loss_nats
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with_adapter = evaluate_loss(adapted, tokenizer, CORPUS).loss_nats
    assert abs(with_adapter - plain) > 1e-3
    assert evaluate_loss(adapted.merge_and_unload(), tokenizer, CORPUS).loss_nats == pytest.approx(with_adapter, abs=1e-5)
