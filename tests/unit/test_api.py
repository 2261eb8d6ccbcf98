"""The calls of ``regraft`` with what a user of transformers has in hand: models, tokenizers, texts and data sets in memory."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import regraft
from folders import tiny_tokenizer
from regraft.data.text import Corpus, split_corpus
from regraft.errors import ConfigError, DataError, InputError, ModelError, RegraftError
from regraft.pipelines import texts
from regraft.pipelines.export_model import check_text, to_compare
from regraft.surgery.adapters import inject

# PEFT 0.21 asks for a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXTS = [f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40)]
IDS = torch.arange(3, 23)[None]
QUICK: dict[str, Any] = {"samples": 10, "seq_len": 20, "align": 2}
STEPS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 24, "eval_steps": 2, "quiet": True}


class Rows:
    """What is needed of a ``datasets.Dataset``: rows as mappings, again and again, under named columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


CHAT = [{"role": "user", "content": "What jumps?"}, {"role": "assistant", "content": "The fox."}]


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS), encoding="utf-8")
    return path


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def same(first: nn.Module, second: nn.Module) -> bool:
    return unchanged(first, state(second))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"criterion": "taylor", "select": "global", "shape": "per-layer", "reconstruct": "none"}, {}])
def test_a_model_in_memory_is_pruned_as_its_folder_is(model: PreTrainedModel, tmp_path: Path, text: Path, settings: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    before, model = state(model), model.train()
    live = regraft.prune(model, tokenizer=tokenizer, ratio=0.3, calibration=TEXTS, **settings, **QUICK)
    folder = regraft.prune(tmp_path / "model", ratio=0.3, calibration=text, **settings, **QUICK)
    rows = regraft.prune(model, tokenizer=tokenizer, ratio=0.3, calibration=Rows([{"text": line} for line in TEXTS]), **settings, **QUICK)
    assert live.plan.cuts == folder.plan.cuts == rows.plan.cuts
    assert live.model is not None
    assert folder.model is not None
    assert same(live.model, folder.model)
    assert unchanged(model, before)
    assert model.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.jsonl"]
    assert live.provenance.settings["calibration"]["documents"] == len(TEXTS)
    assert live.model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_the_result_shares_nothing_with_the_model(model: PreTrainedModel) -> None:
    before = state(model)
    pruned = regraft.prune(model, criterion="l2", ratio=0.2).model
    assert pruned is not None
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1.0)
    assert unchanged(model, before)


@pytest.mark.slow
def test_in_place_the_object_becomes_the_pruned_model(model: PreTrainedModel, make_model: Callable[..., PreTrainedModel]) -> None:
    plain = regraft.prune(make_model("llama"), criterion="l2", ratio=0.3, shape="per-layer", select="global").model
    result = regraft.prune(model, criterion="l2", ratio=0.3, shape="per-layer", select="global", in_place=True)
    assert result.model is model
    assert plain is not None
    assert type(model) is type(plain)
    assert same(model, plain)


def test_a_result_saves_itself_and_prints_short(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = regraft.prune(model, tokenizer=tiny_tokenizer(), criterion="l2", ratio=0.3)
    record = result.save_pretrained(tmp_path / "saved")
    assert record.files.keys() == {"model.safetensors"}
    assert result.model is not None
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), result.model)
    assert len(repr(result).splitlines()) == 1
    assert len(repr(result)) < 120
    assert f"{result.plan.parameters_after:,}" in str(result.report)
    seen: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **more: seen.append(repo_id))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, repo_id, folder_path, **more: seen.append(sorted(path.name for path in Path(folder_path).iterdir())) or "commit",
    )
    assert result.push_to_hub("me/small") == "commit"
    assert seen[0] == "me/small"
    assert {"model.safetensors", "config.json", "regraft.json", "README.md", "tokenizer.json"} <= set(seen[1])


def test_a_hub_that_refuses_is_one_of_our_errors(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, repo_id: str, **more: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(RegraftError, match="'me/small' cannot be written to the hub: no route to host"):
        regraft.prune(model, criterion="l2", ratio=0.3).push_to_hub("me/small")


@pytest.mark.long
def test_recovery_of_a_model_in_memory_leaves_it_as_it_is(model: PreTrainedModel, tmp_path: Path) -> None:
    before = state(model)
    result = regraft.recover(model, tokenizer=tiny_tokenizer(), data=TEXTS, r=2, lora_alpha=4, learning_rate=1e-2, **STEPS)
    assert unchanged(model, before)
    assert (result.settings.rank, result.settings.alpha, result.settings.steps, result.settings.lr) == (2, 4.0, 4, 1e-2)
    assert not same(result.model, model)
    result.save_pretrained(tmp_path / "recovered")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "recovered"), result.model)
    in_place = regraft.recover(model, tokenizer=tiny_tokenizer(), data=TEXTS, r=2, lora_alpha=4, learning_rate=1e-2, in_place=True, **STEPS)
    assert in_place.model is model
    assert same(model, result.model)


@pytest.mark.slow
def test_recovery_goes_on_from_a_live_lora(model: PreTrainedModel, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
    before = state(adapted)
    ids = torch.tensor([[1, 5, 9, 20]])
    start = adapted(ids).logits
    result = regraft.recover(adapted, tokenizer=tiny_tokenizer(), data=TEXTS, learning_rate=1e-2, **STEPS)
    assert unchanged(adapted, before)
    assert isinstance(result.model, PeftModel)
    assert result.recovered.best_loss < result.recovered.first_loss
    assert not torch.equal(result.model(ids).logits, start)
    own = {name for name in before if "lora_" in name}
    moved = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == own  # the base stays as it is
    result.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(adapted.unload()), tmp_path / "adapter")
    assert torch.allclose(again(ids).logits, result.model(ids).logits, atol=1e-5)


def test_what_the_live_lora_decides_is_not_given_again(model: PreTrainedModel) -> None:
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="`rank` is that of the adapter"):
        regraft.recover(adapted, tokenizer=tiny_tokenizer(), data=TEXTS, r=8, **STEPS)


@pytest.mark.slow
def test_epochs_are_counted_in_steps(model: PreTrainedModel) -> None:
    usual = {name: value for name, value in STEPS.items() if name != "max_steps"}
    tokenizer = tiny_tokenizer()
    result = regraft.recover(model, tokenizer=tokenizer, data=TEXTS[:8], num_train_epochs=2, held_out=0.25, rank=2, **usual)
    train, _ = split_corpus(Corpus("texts", "all", tuple(TEXTS[:8])), 0.25, 0)
    tokens = sum(len(tokenizer(text).input_ids) + 1 for text in train.documents) - 1  # with EOS between two
    with pytest.raises(InputError, match="above the limit of 1,000,000; give fewer, or `steps`"):
        regraft.recover(model, tokenizer=tokenizer, data=TEXTS[:8], num_train_epochs=1e9, rank=2, **usual)
    assert result.settings.steps == math.ceil(2 * (tokens // 24) / 2)
    assert result.recovered.log[-1].step == result.settings.steps
    assert result.settings.epochs is None


@pytest.mark.slow
def test_a_model_in_memory_is_measured_as_its_folder_is(model: PreTrainedModel, tmp_path: Path, text: Path) -> None:
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    live = regraft.evaluate(model, tokenizer=tokenizer, text=iter(TEXTS), window=32)
    folder = regraft.evaluate(tmp_path / "model", text=text, window=32)
    assert live.loss.loss_nats == folder.loss.loss_nats
    assert live.size.parameters == folder.size.parameters
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert regraft.evaluate(adapted, tokenizer=tokenizer, text=TEXTS, window=32).loss.loss_nats == pytest.approx(live.loss.loss_nats)


@pytest.mark.slow
def test_ranks_for_a_model_in_memory_are_those_of_its_folder(model: PreTrainedModel, tmp_path: Path, text: Path) -> None:
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    usual: dict[str, Any] = {"method": "gradient", "ranks": (2, 3, 4), "samples": 4, "budget": "r=3", "seq_len": 20}
    live = regraft.allocate_ranks(model, tokenizer=tokenizer, data=TEXTS, **usual)
    folder = regraft.allocate_ranks(tmp_path / "model", data=text, **usual)
    assert live.plan.ranks == folder.plan.ranks
    assert len(set(live.plan.ranks.values())) > 1
    result = regraft.recover(model, tokenizer=tokenizer, data=TEXTS, ranks=live.plan, **STEPS)
    assert result.record.ranks == live.plan


@pytest.mark.slow
def test_a_model_in_memory_is_compressed_as_its_folder_is(model: PreTrainedModel, tmp_path: Path, text: Path) -> None:
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    before, model = state(model), model.train()
    settings = regraft.CompressSettings(ratio=0.3, samples=24, seq_len=20)
    live = regraft.compress(model, tmp_path / "out", settings, tokenizer=tokenizer, calibration=iter(TEXTS))
    folder = regraft.compress(tmp_path / "model", None, settings, calibration=text)
    assert live.plan.factorings == folder.plan.factorings
    assert live.model is not None
    assert folder.model is not None
    assert same(live.model, folder.model)
    assert unchanged(model, before)
    assert model.training
    assert live.tokenizer is tokenizer
    sizes = tuple(sum(parameter.numel() for parameter in one.parameters()) for one in (model, live.model))
    assert (live.report.parameters_before, live.report.parameters_after) == sizes
    assert repr(live) == f"CompressResult({sizes[0]:,} -> {sizes[1]:,} stored parameters, {type(live.model).__name__})"
    assert str(live.report).startswith(f"stored parameters {sizes[0]:,} -> {sizes[1]:,}: ")
    assert sum(row["factored"] for row in live.report.rows) == len(live.plan.factorings)
    record = json.loads((tmp_path / "out" / "regraft.json").read_text(encoding="utf-8"))
    assert record["settings"]["calibration"]["documents"] == len(TEXTS)
    with torch.no_grad():
        for parameter in live.model.parameters():
            parameter.add_(1.0)
    assert unchanged(model, before)


@pytest.mark.long
def test_a_model_in_memory_is_exported_as_its_folder_is(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    before, model = state(model), model.train()
    few = regraft.ExportSettings(check_positions=8)
    live = regraft.export(model, tmp_path / "live", "hf", tokenizer=tokenizer, settings=few)
    folder = regraft.export(tmp_path / "model", tmp_path / "folder", "hf", settings=few)
    assert live.parity is not None
    assert folder.parity is not None
    assert live.parity.perplexity == folder.parity.perplexity
    # Neither has text of its own, and none is read in silence.
    assert any("no text was given for the comparison" in note for note in live.notes)
    assert live.notes == folder.notes
    given = regraft.export(model, tmp_path / "given", "hf", tokenizer=tokenizer, settings=few, check=" ".join(TEXTS))
    assert not any("no text was given" in note for note in given.notes)
    assert given.parity is not None
    assert given.parity.perplexity != live.parity.perplexity
    assert unchanged(model, before)
    assert model.training
    assert (tmp_path / "live" / "model.safetensors").read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "live"), model)
    with pytest.raises(ModelError, match="a Linear is not a model"):
        regraft.export(nn.Linear(3, 3), tmp_path / "none", "hf")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="a form of adapters, not of a model in memory"):
        regraft.export(model, tmp_path / "none", "peft-lora", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="quantise: unknown keyword; did you mean 'quantize'"):
        regraft.export(model, tmp_path / "none", "hf", tokenizer=tokenizer, quantise="Q8_0")
    assert not (tmp_path / "none").exists()


@pytest.mark.long
def test_a_live_adapter_is_exported_alone_or_in_its_model(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = state(cast(PreTrainedModel, adapted))
    for to in ("merged", "hf", "peft-lora"):
        regraft.export(adapted, tmp_path / to, to, tokenizer=tokenizer)
    assert unchanged(cast(PreTrainedModel, adapted), before)
    assert adapted.training
    with torch.no_grad():
        wanted = adapted.eval()(IDS).logits
        assert (model(IDS).logits - wanted).abs().max() > 0.1
        for to in ("merged", "hf"):
            assert (LlamaForCausalLM.from_pretrained(tmp_path / to)(IDS).logits - wanted).abs().max() <= 1e-4
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        assert (PeftModel.from_pretrained(base, tmp_path / "peft-lora")(IDS).logits - wanted).abs().max() <= 1e-4


def with_quantized_layers(model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch is to drop these layers
        cast(LlamaForCausalLM, model).model.layers[0].mlp.down_proj = torch.ao.nn.quantized.Linear(8, 8)
    return model


NOT_CAUSAL: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "an encoder": (
        lambda model: BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)),
        "BertModel does not predict the next token",
    ),
    "a translator": (
        lambda model: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=97)),
        "T5ForConditionalGeneration does not predict",
    ),
    "virtual tokens": (
        lambda model: get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type=TaskType.CAUSAL_LM)),
        "PROMPT_TUNING, whose virtual tokens",
    ),
    "quantized layers": (with_quantized_layers, "is quantized"),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_predicts_no_tokens_is_not_evaluated(model: PreTrainedModel, name: str) -> None:
    make, words = NOT_CAUSAL[name]
    with pytest.raises(ModelError, match=words):
        regraft.evaluate(make(model), tokenizer=tiny_tokenizer(), text=TEXTS)


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    model.is_quantized = True  # as transformers marks what bitsandbytes and others have loaded
    return model


BAD: dict[str, tuple[Callable[[PreTrainedModel], Any], dict[str, Any], type[RegraftError], str]] = {
    "a family that cannot be pruned": (
        lambda model: BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)),
        {},
        ModelError,
        "",
    ),
    "no model": (lambda model: nn.Linear(3, 3), {}, ModelError, "a Linear is not a model"),
    "a tokenizer that does not fit": (lambda model: model, {"tokenizer": tiny_tokenizer(120)}, ModelError, "ids up to 119, the embedding"),
    "no tokenizer": (lambda model: model, {"tokenizer": "gpt2"}, ModelError, "`tokenizer` is a str"),
    "a keyword that does not exist": (lambda model: model, {"rati": 0.3}, ConfigError, "rati: unknown keyword; did you mean 'ratio'?"),
    "a value that cannot be": (lambda model: model, {"ratio": 2}, ConfigError, "ratio: should be above 0.0 and below 1.0 (got 2)"),
    "a criterion that does not exist": (lambda model: model, {"criterion": "magnitude"}, ConfigError, "known: "),
    "rows without a text column": (lambda model: model, {"calibration": Rows([{"body": "x"}])}, DataError, "its keys: 'body'"),
    "splits": (lambda model: model, {"calibration": {"train": TEXTS, "test": TEXTS}}, DataError, "give one part of it"),
    "empty text": (lambda model: model, {"calibration": []}, DataError, "is empty"),
    "texts without an order": (lambda model: model, {"calibration": set(TEXTS)}, DataError, "is a set, which has another order each time"),
    "texts without an end": (lambda model: model, {"calibration": itertools.repeat("x")}, DataError, "is a stream of more than 100 rows"),
    "a switch that is none": (lambda model: model, {"in_place": "no"}, InputError, "`in_place` is 'no'; give True or False"),
    "no function": (lambda model: model, {"say": 3}, InputError, "`say` is 3; give a function"),
    "a text in the place of a file": (
        lambda model: model, {"calibration": " ".join(TEXTS)}, DataError, "characters stands where the name of a file is read"
    ),
    "lines in the place of a file": (lambda model: model, {"calibration": "a\nb"}, DataError, "give texts in a list: [TEXT]"),
    "bytes": (lambda model: model, {"calibration": b"abc"}, DataError, "`calibration` is a bytes; give a file"),
    "one chat, not in a list": (
        lambda model: model, {"calibration": CHAT}, DataError, "row 1 is one message of a chat; give chats, each a list of its messages"
    ),
    "a wrapped model": (torch.nn.DataParallel, {}, ModelError, "a DataParallel is not a model; give its `module`"),
    "a model without its head": (lambda model: model.base_model, {}, ModelError, "LlamaModel does not predict the next token"),
    "a number": (lambda model: model, {"calibration": 7}, DataError, "`calibration` is an int"),
    "a live PEFT model": (
        lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), {}, ModelError, "merge_and_unload"
    ),
    "an adapter inside": (
        lambda model: model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"])) or model, {}, ModelError, "merge_and_unload"
    ),
    "layers of an adapter": (
        lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model(), {}, ModelError,
        "carries an adapter of PEFT in 'model.layers.0.self_attn.q_proj'",
    ),
    "a quantized model": (quantized, {}, ModelError, "is quantized"),
    "no weights": (lambda model: model.to("meta"), {}, ModelError, "lies on meta"),
    "memory": (lambda model: model, {"memory": "6GB"}, InputError, "`memory` is for models that are not loaded yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_and_changes_nothing(model: PreTrainedModel, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    make, given, kind, words = BAD[name]
    monkeypatch.setattr(texts, "MOST_STREAMED_ROWS", 100)
    monkeypatch.chdir(tmp_path)
    wrong = make(model)
    values = {key: tensor.clone() for key, tensor in wrong.state_dict().items()} if "meta" not in name and name != "no weights" else {}
    keywords = {"tokenizer": tiny_tokenizer(), "calibration": TEXTS} | given
    with pytest.raises(RegraftError) as caught:
        regraft.prune(wrong, **(QUICK | keywords))
    assert type(caught.value) is kind, caught.value
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    assert all(torch.equal(wrong.state_dict()[key], tensor) for key, tensor in values.items())
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_finds_its_tokenizer_where_it_was_loaded_from(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'LlamaForCausalLM' has no tokenizer, which a model in memory does not bring; give its own"):
        regraft.evaluate(model, text=TEXTS)
    model.save_pretrained(tmp_path / "model")
    held = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"copy the model.s tokenizer\.json"):
        regraft.evaluate(held, text=TEXTS)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = regraft.evaluate(held, tokenizer=tiny_tokenizer(), text=TEXTS)
    assert regraft.evaluate(held, text=TEXTS).loss.loss_nats == given.loss.loss_nats
    tiny_tokenizer(120).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="ids up to 119"):
        regraft.evaluate(held, text=TEXTS)


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = {
    "a section of another kind": (
        regraft.prune, (), {"settings": regraft.RecoverSettings()}, "`settings` is a RecoverSettings; give PruneSettings(...)"
    ),
    "a section in the place of loading": (
        regraft.recover, (), {"load": regraft.PruneSettings()}, "`load` is a PruneSettings; give LoadSettings(...)"
    ),
    "a section in the place of recovery": (
        regraft.allocate_ranks, (), {"recover": {"steps": 3}}, "`recover` is a dict; give RecoverSettings(...)"
    ),
    "a section in the place of a measurement": (
        regraft.evaluate_tasks, (), {"evaluate": regraft.TaskSettings()}, "`evaluate` is a TaskSettings; give EvaluateSettings(...)"
    ),
    "a tokenizer in the place of the output": (
        regraft.prune, (tiny_tokenizer(),), {}, "a tokenizer is given by its name: tokenizer=..."
    ),
    "a tokenizer in the place of the settings": (
        regraft.evaluate, (tiny_tokenizer(),), {}, "a tokenizer is given by its name: tokenizer=..."
    ),
    "texts in the place of the output": (regraft.compress, (TEXTS,), {}, "`output` is a list, no path"),
    "no output": (regraft.export, (None, "hf"), {}, "`output` is None; give the name of a new folder"),
    "no name of a format": (regraft.export, ("never", 3), {}, "the name of the export format is an int; known: "),
    "no plan": (regraft.replay, ({},), {}, "`plan` is a dict; give the `plan` of a result"),
    "a file in the place of a plan": (regraft.compress, (), {"plan": "plan.json"}, "`plan` is a str; give the `plan` of a result"),
    "data by the word of a trainer": (regraft.recover, (), {"train_dataset": TEXTS}, "the text of this call is `data`"),
    "text of recovery by another word": (regraft.recover, (), {"calibration": TEXTS}, "the text of this call is `data`"),
    "text of pruning by another word": (regraft.prune, (), {"data": TEXTS}, "the text of this call is `calibration`"),
    "text of a measurement by another word": (regraft.evaluate, (), {"data": TEXTS}, "the text of this call is `text`"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_in_the_wrong_place_is_named_shortly(name: str) -> None:
    call, given, keywords, words = CALLS[name]
    with pytest.raises(InputError) as caught:
        call("seedling", *given, **keywords)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 140


@pytest.mark.parametrize("rows", [pd.DataFrame({"text": TEXTS, "n": range(40)}), pa.table({"text": TEXTS})], ids=["pandas", "pyarrow"])
def test_a_table_gives_its_rows_and_not_its_columns(rows: Any) -> None:
    assert texts.read(rows, "test", "text") == texts.read(TEXTS, "test", "text")


def test_a_chat_is_a_list_of_messages_or_a_row_with_them() -> None:
    chats = texts.read([CHAT, CHAT], "test", "data")
    assert chats == texts.read([{"messages": CHAT}] * 2, "test", "data")
    assert [record.output for record in chats.records] == ["The fox."] * 2


def test_the_text_of_a_comparison_is_given_as_any_other(text: Path) -> None:
    assert to_compare(text) == str(text)
    assert to_compare(TEXTS) == check_text(str(text)) == "\n\n".join(TEXTS)
    assert [to_compare(given) for given in (None, "", "some text")] == [None, "", "some text"]
    with pytest.raises(DataError, match="`check` is an int"):
        to_compare(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_pruned_model_without_linear_layers_is_recovered_by_default(make_model: Callable[..., PreTrainedModel]) -> None:
    """GPT-2's projections are of a kind of their own, which the proportional ranks of the default do not count."""
    pruned = regraft.prune(make_model("gpt2"), criterion="l2", ratio=0.2).model
    assert pruned is not None
    result = regraft.recover(pruned, tokenizer=tiny_tokenizer(), data=TEXTS, r=2, **STEPS)
    assert result.recovered.best_loss < result.recovered.first_loss


@pytest.mark.slow
def test_the_residual_width_alone_is_cut_by_default(model: PreTrainedModel) -> None:
    result = regraft.prune(model, tokenizer=tiny_tokenizer(), calibration=TEXTS, ratio=0.2, targets="residual", **QUICK)
    assert result.model is not None
    assert result.model.config.hidden_size < model.config.hidden_size


@pytest.mark.slow
def test_an_adapter_that_is_switched_off_learns_all_the_same(model: PreTrainedModel) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    cast(Any, adapted.base_model).disable_adapter_layers()
    result = regraft.recover(adapted, tokenizer=tiny_tokenizer(), data=TEXTS, learning_rate=1e-2, **STEPS)
    assert result.recovered.best_loss < result.recovered.first_loss
    assert not any(parameter.requires_grad for name, parameter in adapted.named_parameters() if "lora_" in name)


def test_what_is_no_path_no_report_and_no_keyword_is_said(model: PreTrainedModel, tmp_path: Path) -> None:
    result = regraft.prune(model, criterion="l2", ratio=0.3)
    with pytest.raises(InputError, match="folder is a NoneType, no path"):
        result.save_pretrained(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="recipe is a LlamaForCausalLM, no path"):
        regraft.run(model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="what is compared is a NoneType; give two results of `evaluate_tasks`"):
        regraft.compare_tasks(None, None)  # pyright: ignore[reportArgumentType]
    result.save_pretrained(tmp_path / "saved")
    assert regraft.load(tmp_path / "saved", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtpye: unknown keyword; did you mean 'dtype'"):
        regraft.load(tmp_path / "saved", dtpye="float32")
    assert regraft.TaskSettings(tasks="continuation").tasks == ("continuation",)  # pyright: ignore[reportArgumentType]


def test_a_model_with_an_adapter_of_ours_is_named_as_such(model: PreTrainedModel) -> None:
    inject(model, regraft.RecoverSettings(adapter="nola"), None, 0)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM carries an adapter of regraft in 'model\.layers\.0.*recover with `merge`"):
        regraft.prune(model, criterion="l2")


def test_settings_are_checked_when_they_are_made() -> None:
    with pytest.raises(ConfigError, match=r"PruneSettings: criterion: unknown criterion 'tailor'.*did you mean 'taylor'\?"):
        regraft.PruneSettings(criterion="tailor")
    with pytest.raises(ConfigError, match="r and rank are one setting; give one of the two"):
        regraft.RecoverSettings(r=4, rank=8)
    assert regraft.LoadSettings(torch_dtype=torch.bfloat16, device_map="cpu") == regraft.LoadSettings(dtype="bfloat16", device="cpu")
    assert regraft.RecoverSettings(target_modules="all-linear", report_to="none") == regraft.RecoverSettings()
    assert regraft.RecoverSettings(target_modules=None) == regraft.RecoverSettings()
    with pytest.raises(ConfigError, match=r"ranks: should be a file name or a RankPlan \(got"):
        regraft.RecoverSettings(ranks=object())
    places = ({"": "cpu"}, {"": 1}, 0, None, torch.device("cpu"))
    assert [regraft.LoadSettings(device_map=place).device for place in places] == ["cpu", "cuda:1", "cuda:0", "auto", "cpu"]
    with pytest.raises(ConfigError, match="epochs and steps both say how long to train"):
        regraft.RecoverSettings(max_steps=3, num_train_epochs=1)
    with pytest.raises(InputError, match="PruneSettings does not change"):
        regraft.PruneSettings().ratio = 0.3  # type: ignore[misc]
    assert "secret" not in repr(regraft.LoadSettings(token="secret"))
    assert "secret" not in regraft.LoadSettings(token="secret").model_dump_json()


@pytest.mark.long
def test_every_public_name_is_there_and_the_import_is_light() -> None:
    assert dir(regraft) == sorted([*regraft.__all__, "__version__"])
    assert regraft.__version__ == version("regraft")
    code = (
        "import sys, regraft; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules), 'heavy'; import regraft.export; "
        "missing = [name for name in dir(regraft) if not hasattr(regraft, name)]; assert not missing, missing; "
        "assert callable(regraft.export)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
