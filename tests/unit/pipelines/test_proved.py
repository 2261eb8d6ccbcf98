"""Adapters as stock PEFT saves them: loaded, merged and exported, each computes what PEFT computes beside, or is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import regraft.pipelines.export as exporting
from folders import tiny_tokenizer
from regraft.errors import InputError, ModelError, OutputError
from regraft.models.load import load
from regraft.pipelines.export import export
from regraft.pipelines.recover import recover_model
from regraft.settings import LoadSettings, RecoverSettings
from regraft.surgery.adapter_folder import load_adapted
from regraft.surgery.probe import probe, refuse_other

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = LoadSettings(device="cpu")
IDS = torch.arange(40)[None]
ATTENTION = ["q_proj", "v_proj"]
WITH_BIAS, TIED = {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}

# Of the base, of the adapter, and what --to merged and --to peft-lora refuse with; None where they work.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None, str | None]] = {
    "rslora": ({}, {"use_rslora": True}, None, None),
    "dora": ({}, {"use_dora": True}, None, "DoRA"),
    "embedding": ({}, {"target_modules": ["q_proj", "embed_tokens"]}, None, None),
    "embedding, tied": (TIED, {"target_modules": ["q_proj", "embed_tokens"]}, None, None),
    "head, tied": (TIED, {"target_modules": ["q_proj", "lm_head"]}, None, None),
    "both, tied": (TIED, {"target_modules": ["embed_tokens", "lm_head"]}, None, None),
    "tied as PEFT ties": (TIED, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, None, None),
    "saved whole": ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}, None, "modules_to_save"),
    "saved whole, tied": (TIED, {"modules_to_save": ["embed_tokens"]}, None, "modules_to_save"),
    "biases of the adapted": (WITH_BIAS, {"bias": "lora_only"}, None, "`bias`.*--to merged"),
    "all biases": (WITH_BIAS, {"bias": "all"}, None, "`bias`.*--to merged"),
    "bias of its own": (WITH_BIAS, {"lora_bias": True}, None, "`lora_bias`.*--to merged"),
    "bias without a place": ({}, {"lora_bias": True}, "cannot fold .*no bias.*keep it beside", "`lora_bias`"),
    "some tokens": ({}, {"trainable_token_indices": [3, 90]}, None, "`trainable_token_indices`.*--to merged"),
    "some tokens, tied": (TIED, {"trainable_token_indices": [3, 90]}, None, "`trainable_token_indices`"),
    "some tokens by name": ({}, {"trainable_token_indices": {"embed_tokens": [3, 90]}}, None, "`trainable_token_indices`"),
}


@pytest.fixture
def base(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    def make(**config: Any) -> Path:
        make_model("llama", **config).save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def trained(base: Path, folder: Path, rows: int | None = None, **config: Any) -> Tensor:
    """Saves a stock adapter whose every trained number was moved; returns the logits of its model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ATTENTION} | config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return logits(adapted)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_stock_adapter_computes_what_peft_computes(base: Callable[..., Path], tmp_path: Path, name: str) -> None:
    config, adapter, no_merge, no_lora = CASES[name]
    folder, ours = base(**config), tmp_path / "a"
    wanted = trained(folder, ours, **adapter)
    beside = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), ours))
    close(beside, wanted)
    assert float((wanted - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max()) > 0.1
    close(logits(load_adapted(ours, CPU).model), wanted)
    if no_merge is None:
        export(ours, tmp_path / "merged", "merged", load=CPU)
        close(logits(load(tmp_path / "merged", CPU).model), wanted)
        close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted)
    else:
        with pytest.raises(InputError, match=no_merge):
            export(ours, tmp_path / "merged", "merged", load=CPU)
        assert not (tmp_path / "merged").exists()
    if no_lora is None:
        export(ours, tmp_path / "lora", "peft-lora", load=CPU)
        close(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora")), wanted)
    else:
        with pytest.raises(InputError, match=no_lora):
            export(ours, tmp_path / "lora", "peft-lora", load=CPU)
        assert not (tmp_path / "lora").exists()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_an_adapter_of_a_resized_base_says_how_many_rows(base: Callable[..., Path], tmp_path: Path, adapter: dict[str, Any]) -> None:
    folder = base()
    trained(folder, tmp_path / "a", rows=99, **adapter)
    with pytest.raises(ModelError, match=r"99 rows in the embedding against 97 of its base .*resize_token_embeddings.*`base`"):
        load_adapted(tmp_path / "a", CPU)
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.resize_token_embeddings(99, mean_resizing=False)
    again.save_pretrained(tmp_path / "resized")
    load_adapted(tmp_path / "a", CPU.model_copy(update={"base": str(tmp_path / "resized")}))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["merged", "peft-lora", "hf"])
def test_what_is_merged_or_saved_wrongly_gets_no_name(
    base: Callable[..., Path], tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base(), tmp_path / "a")

    def spoilt(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(adapted: Any) -> Any:
            found = real(adapted)
            if isinstance(found, dict):
                return {name: replace(factor, left=1.05 * factor.left) for name, factor in found.items()}
            found.model.layers[1].self_attn.q_proj.weight.data *= 1.05
            return found

        return call

    for name in ("merge_stock", "stock_factors"):
        monkeypatch.setattr(exporting, name, spoilt(getattr(exporting, name)))
    with pytest.raises(OutputError, match=r"is not what was trained: its logits differ by .* of their spread, above 0\.001"):
        export(tmp_path / "a", tmp_path / "out", to, load=CPU)
    assert sorted(os.listdir(tmp_path)) == ["a", "base"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_and_a_lost_change_is(make_model: Callable[..., PreTrainedModel], dtype: torch.dtype) -> None:
    before = probe(make_model("llama"))  # in float32, as weights of 16 bits are held while an adapter is trained
    refuse_other(before, make_model("llama").to(dtype), "it", "no")
    other = make_model("llama")
    other.model.layers[0].mlp.up_proj.weight.data *= 1.3
    with pytest.raises(OutputError, match="it is not what was trained"):
        refuse_other(before, other.to(dtype), "it", "no")


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["lora", "nola"])
def test_an_adapter_finds_its_base_from_anywhere(
    base: Callable[..., Path], tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name that was given, beside the adapter, where it lay, or where the user says; never another of the same name."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.move(base(), work / "base")
    monkeypatch.chdir(work)
    text = ["the cat sat on the mat and saw two birds " * 20]
    settings = RecoverSettings(adapter=adapter, rank=2, steps=2, batch=1, seq_len=16, merge=False, quiet=True, precision="float32")
    recover_model("base", "a", settings, data=text, load=CPU)
    wanted = logits(load_adapted(Path("a"), CPU).model)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    close(logits(load_adapted(work / "a", CPU).model), wanted)  # beside the adapter
    other = AutoModelForCausalLM.from_pretrained(work / "base")
    other.lm_head.weight.data *= 2
    other.save_pretrained(elsewhere / "base")
    close(logits(load_adapted(work / "a", CPU).model), wanted)  # another of its name lies here
    shutil.move(work / "a", elsewhere / "a")
    close(logits(load_adapted(Path("a"), CPU).model), wanted)  # where it lay
    shutil.move(work / "base", tmp_path / "moved")
    with pytest.raises(ModelError, match=r"was saved for another base: .base. with fingerprint"):
        load_adapted(Path("a"), CPU)
    close(logits(load_adapted(Path("a"), CPU.model_copy(update={"base": str(tmp_path / "moved")})).model), wanted)
    with pytest.raises(ModelError, match="was saved for another base"):
        load_adapted(Path("a"), CPU.model_copy(update={"base": "base"}))
    shutil.rmtree(elsewhere / "base")
    with pytest.raises(ModelError, match=r"no folder.*`base`|not a folder here.*`base`"):
        load_adapted(Path("a"), CPU)


def test_a_model_takes_no_base_and_an_adapter_is_no_model(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    trained(folder, tmp_path / "a")
    with pytest.raises(InputError, match=r"`base=x` is for the folder of an adapter"):
        load(folder, LoadSettings(base="x"))
    for name in ("a", "own"):
        with pytest.raises(ModelError, match=rf"is an adapter on the base '{re.escape(str(folder))}'.*--to merged"):
            load(tmp_path / name, CPU)
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / "adapter.json").write_text(json.dumps({"base": str(folder)}), encoding="utf-8")
