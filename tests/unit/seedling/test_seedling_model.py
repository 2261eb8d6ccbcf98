"""What the package carries: files that stock transformers loads, and figures that hold."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from regraft import seedling
from regraft.errors import ModelError
from regraft.seedling.corpus import documents, split_of


@pytest.fixture(scope="module")
def folder() -> Path:
    return seedling.path()


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def held_out(folder: Path) -> dict:
    return json.loads((folder / "held_out.json").read_text(encoding="utf-8"))


def test_folder_is_complete_and_small(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert sizes[name] > 100
    assert sizes["model.safetensors"] <= 12_000_000
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pkl"))]


def test_weights_are_bf16_and_the_tied_ones_are_stored_once(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        names = list(stored.keys())
        assert {stored.get_tensor(name).dtype for name in names} == {torch.bfloat16}
        assert all(stored.get_tensor(name).isfinite().all() for name in names)
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stock_transformers_loads_and_generates(folder: Path, tokenizer, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert 3_000_000 <= model.num_parameters() <= 6_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    inputs = tokenizer("def __init__(self", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert written.shape == (1, inputs["input_ids"].shape[1] + 8)


def test_shape_leaves_room_for_aligned_pruning(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] >= 4
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["intermediate_size"] % 16 == 0
    assert config["tie_word_embeddings"] is True


def test_tokenizer_knows_its_special_tokens_and_fits_the_embedding(folder: Path, tokenizer) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids = (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == ids
    assert len(tokenizer) == config["vocab_size"]
    assert 2048 <= len(tokenizer) <= 4096
    assert tokenizer.model_max_length == config["max_position_embeddings"]
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tokenizer("x", add_special_tokens=False).input_ids


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example(text="a special token <|bos|> in a text<|eos|>")
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    loaded = _tokenizer_once()
    ids = loaded(text).input_ids
    assert ids[0] == loaded.bos_token_id
    assert loaded.decode(ids[1:]) == text
    assert loaded.decode(loaded(text, add_special_tokens=False).input_ids) == text
    if not any(token in text for token in loaded.all_special_tokens):  # these are skipped wherever they stand
        assert loaded.decode(ids, skip_special_tokens=True) == text


_LOADED: list = []


def _tokenizer_once():
    if not _LOADED:
        _LOADED.append(AutoTokenizer.from_pretrained(seedling.path()))
    return _LOADED[0]


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\n", "\t x  ,  y .\n", "naïve 😀 日本語 \x00 \u200b e\u0301", "don't  stop ,  he 's", "\r\nx"]
)
def test_white_space_marks_and_odd_characters_come_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_special_tokens_are_not_made_by_other_text(tokenizer) -> None:
    ids = tokenizer("<s></s><bos>", add_special_tokens=False).input_ids
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.slow
def test_loss_on_a_part_of_the_test_split_is_as_stated_and_far_below_the_unigram(folder: Path, tokenizer, held_out: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = documents("test", limit_chars=20_000)[0].text
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)[:16]
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss.item()
        shuffled = windows[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
        loss_of_shuffled = model(input_ids=shuffled, labels=shuffled).loss.item()
    assert loss < held_out["measured"]["unigram"]["loss_nats_per_token"] - 1.0
    assert loss_of_shuffled > loss + 1.0  # it reads the order, not the words alone


def test_held_out_figures_are_complete_and_consistent(held_out: dict) -> None:
    measured = held_out["measured"]
    assert (measured["window_tokens"], measured["stride_tokens"]) == (512, 256)
    for name in ("seedling", "unigram", "5-gram"):
        figure = measured[name]
        bits = figure["loss_nats_per_token"] * measured["tokens_scored"] / math.log(2) / measured["text_bytes"]
        assert math.isclose(bits, figure["bits_per_byte"], rel_tol=1e-9)
    others = [measured[name]["bits_per_byte"] for name in ("unigram", "5-gram", "gzip -9", "xz -9e")]
    assert measured["seedling"]["bits_per_byte"] < min(others)


def test_held_out_documents_are_those_of_the_rule(held_out: dict) -> None:
    listed = held_out["split"]["test_documents"]
    assert len(listed) == held_out["measured"]["documents"]
    assert {split_of(path) for path in listed} == {"test"}


def test_training_log_reaches_the_last_step(folder: Path, held_out: dict) -> None:
    with (folder / "training_log.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert int(rows[-1]["step"]) == held_out["training"]["steps"] == held_out["training"]["steps_done"]
    assert float(rows[-1]["held_out_loss_nats"]) < float(rows[0]["train_loss_nats"]) - 2.0


def test_card_states_the_measured_figures_and_the_licence_of_the_text(folder: Path, held_out: dict) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("seedling", "5-gram", "unigram", "gzip -9"):
        assert f"{held_out['measured'][name]['bits_per_byte']:.3f}" in card
    assert "PSF License" in card


def test_a_package_without_weights_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seedling, "files", lambda name: tmp_path)
    with pytest.raises(ModelError, match=r"no weights at .*: install regraft from a wheel"):
        seedling.path()
