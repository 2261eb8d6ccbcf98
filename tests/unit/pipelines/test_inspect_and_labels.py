"""``inspect`` and ``evaluate_labels`` take what all calls take: a model in memory, a folder or a hub id, with settings as keywords."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import regraft
from folders import tiny_tokenizer
from regraft.cli.app import run
from regraft.errors import ConfigError, DataError, InputError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
Make = Callable[..., PreTrainedModel]


def without_source(found: regraft.InspectReport) -> dict[str, Any]:
    return {key: value for key, value in found.to_dict().items() if key not in ("source", "adapter")}


@pytest.mark.slow
def test_inspect_says_of_a_model_in_memory_what_it_says_of_its_folder(make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    model.train()
    live = regraft.inspect(model)
    assert model.training
    assert repr(live).startswith("InspectReport(source=")
    assert len(repr(live)) < 200
    assert without_source(live) == without_source(regraft.inspect(tmp_path / "model"))
    assert regraft.inspect(tmp_path / "model", dtype="bfloat16").dtype == "bfloat16"
    assert regraft.inspect(regraft.load(tmp_path / "model")).source == str(tmp_path / "model")
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        regraft.inspect(model, dtyp="float32")
    with pytest.raises(ModelError, match="not a model"):
        regraft.inspect(7)  # type: ignore[arg-type]


@pytest.mark.slow
def test_equal_layers_are_one_row_on_the_screen(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama").save_pretrained(tmp_path / "even")
    assert run(["inspect", str(tmp_path / "even")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.lstrip("│| ")[:1].isdigit() and "│" in line]
    assert len(rows) == 1
    assert "0-2" in rows[0]
    narrow = ["--criterion", "l2", "--align", "1", "--layers", "2:", "-o", str(tmp_path / "uneven")]
    assert run(["prune", str(tmp_path / "even"), *narrow]) == 0
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "uneven")]) == 0
    assert "0-1" in capsys.readouterr().out


@pytest.mark.long
def test_an_adapter_is_inspected_with_its_base(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, text = tmp_path / "base", tmp_path / "text.txt"
    make_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    text.write_text("a cat and a dog sat on the mat " * 40)
    for method in ("lora", "nola"):
        ways = {"data": text, "steps": 1, "seq_len": 8, "batch": 2, "lr": 0.01, "merge": False, "quiet": True}
        regraft.recover(base, tmp_path / method, adapter=method, rank=3, **ways)
        facts = regraft.inspect(tmp_path / method)
        about = facts.adapter
        assert about is not None
        assert about["folder"] == facts.source == str(tmp_path / method)
        assert (about["method"], about["base"], about["ranks"]) == (method, str(base), [3, 3])
        assert without_source(facts) == without_source(regraft.inspect(base))
        assert run(["inspect", str(tmp_path / method)]) == 0
        assert f"{method} of rank 3 on {about['modules']} modules" in " ".join(capsys.readouterr().out.split())
    base.rename(tmp_path / "moved")
    assert run(["inspect", str(tmp_path / "lora")]) == 2
    assert "--base" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "lora"), "--base", str(tmp_path / "moved")]) == 0
    for command in ("prune", "compress"):
        capsys.readouterr()
        assert run([command, str(tmp_path / "lora"), "--base", str(tmp_path / "moved"), "-o", str(tmp_path / "out")]) == 2
        assert f"`regraft export {tmp_path / 'lora'} --to merged --base {tmp_path / 'moved'}" in capsys.readouterr().err


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    names = {"id2label": {0: "few", 1: "many"}, "label2id": {"few": 0, "many": 1}}
    return BertForSequenceClassification(BertConfig(**sizes, **names, max_position_embeddings=64))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": "x" * (index % 7) + "o", "label": "many" if index % 3 else "few"}) for index in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


@pytest.mark.slow
def test_labels_are_measured_of_a_model_in_memory_as_of_its_folder(rows: Path, tmp_path: Path) -> None:
    model, tokenizer = classifier(), tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.train()  # with dropout: the measurement has to be made without
    live = regraft.evaluate_labels(model, data=rows, tokenizer=tokenizer, max_length=16)
    assert model.training
    folder = regraft.evaluate_labels(tmp_path / "model", regraft.LabelSettings(data=rows, seq_len=16))
    assert live.figures == folder.figures
    assert (live.classes, live.rows, live.window_tokens) == (("few", "many"), 30, 16)
    adapted = get_peft_model(classifier(), LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"]))
    assert regraft.evaluate_labels(adapted, data=rows, tokenizer=tokenizer, max_length=16).figures == folder.figures  # B is zero


def test_what_cannot_be_measured_is_refused_in_one_line(rows: Path, make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        regraft.evaluate_labels(classifier(), data=rows)
    with pytest.raises(InputError, match="is for language, not for labels"):
        regraft.evaluate_labels(make_model("llama", pad_token_id=0), data=rows, tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match="pad_token_id"):
        regraft.evaluate_labels(make_model("llama", pad_token_id=None), data=rows, tokenizer=tiny_tokenizer())
    with pytest.raises(InputError, match="`data`"):
        regraft.evaluate_labels(classifier())
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        regraft.evaluate_labels(tmp_path / "no-model", data=tmp_path / "absent.jsonl")
