"""Encoders and decoders learn labels from the command line; what is saved loads in stock transformers and stock PEFT."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from folders import tiny_tokenizer
from regraft.cli.app import run
from regraft.data.labelled import Labelled
from regraft.models.classifier import load_classifier
from regraft.training.callbacks import Pace
from regraft.training.labelled import collate_labelled, figures_of_numbers, labelled_examples, summed_label_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=64)),
    "bert-mlm": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=24, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}


def encoder(folder: Path, kind: str = "bert") -> Path:
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return folder


def data(path: Path, task: str) -> Path:
    """What is asked for can be told from the letters: which of two, or how many."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(120):
        count = int(torch.randint(0, 7, (), generator=generator))
        text = "".join("xo"[int(place < count)] for place in torch.randperm(6, generator=generator).tolist())
        rows.append({"sentence1": text, "sentence2": "abc"[index % 3], "score": count / 6, "label": "many" if count > 3 else "few"})
    keys = ("sentence1", "sentence2", "label" if task == "classification" else "score")
    path.write_text("\n".join(json.dumps({key: row[key] for key in keys}) for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def outputs(model: nn.Module, folder: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(["xoxoxo", "oo"], ["a", "b"], padding=True, return_tensors="pt")
    return model.eval()(**tokens).logits


def recover(capsys: Any, base: Path, rows: Path, out: Path, *more: str) -> str:
    code = run(["recover", str(base), "--data", str(rows), "--output", str(out), "--held-out", "0.2", "--quiet", *more])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "task", "adapter"),
    [
        ("bert", "regression", "lora"),
        ("bert", "classification", "deep_lora"),
        ("llama", "classification", "lora"),
        ("llama", "regression", "mora"),
    ],
)
def test_it_learns_and_stock_transformers_loads_it(tmp_path: Path, capsys: Any, kind: str, task: str, adapter: str) -> None:
    base, rows = encoder(tmp_path / "base", kind), data(tmp_path / "rows.jsonl", task)
    steps = ("--steps", "50", "--batch", "16", "--lr", "0.01", "--eval-every", "25", "--schedule", "constant")
    shown = recover(capsys, base, rows, tmp_path / "out", "--task", task, "--adapter", adapter, *steps)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == ({0: "few", 1: "many"} if task == "classification" else {0: "score"})
    figures = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") == 3}
    name, least = ("held-out accuracy", 0.7) if task == "classification" else ("held-out pearson", 0.7)
    assert float(figures[name]) >= least, shown
    first, after = (float(figures[f"held-out loss {when}"].split()[0]) for when in ("before", "after"))
    assert after < 0.9 * first
    assert outputs(model, tmp_path / "out").shape == (2, len(model.config.id2label))


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["deep_lora", "lora", "olora", "eva"])
def test_the_head_travels_with_the_adapter(tmp_path: Path, capsys: Any, adapter: str) -> None:
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", "classification")
    steps = ("--steps", "6", "--lr", "0.01", "--rank", "4", "--eval-every", "2", "--batch", "16")
    recover(capsys, base, rows, tmp_path / "adapter", "--task", "classification", "--adapter", adapter, "--no-merge", *steps)
    for form in ("merged", "peft-lora"):
        assert run(["export", str(tmp_path / "adapter"), "--to", form, "--output", str(tmp_path / form)]) == 0, capsys.readouterr().err
    merged = outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), base)
    plain = load_classifier(base, ("few", "many")).model
    assert float((outputs(plain, base) - merged).abs().max()) > 1e-3
    assert run(["export", str(tmp_path / "peft-lora"), "--to", "merged", "--output", str(tmp_path / "both")]) == 0, capsys.readouterr().err
    for form in ("merged", "both"):
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / form).config.id2label == {0: "few", 1: "many"}
    stock = PeftModel.from_pretrained(load_classifier(base, ("few", "many"), seed=5).model, str(tmp_path / "peft-lora"))
    assert float((outputs(stock, base) - merged).abs().max()) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize(("kind", "adapter", "new"), [("bert-mlm", "lora", "bert.pooler"), ("modernbert", "deep_lora", "head")])
def test_what_a_checkpoint_lacks_before_the_head_is_learnt_with_it(tmp_path: Path, capsys: Any, kind: str, adapter: str, new: str) -> None:
    """BERT trained on masked words has no pooler: one drawn anew for each load would undo what was learnt."""
    base, rows = encoder(tmp_path / "base", kind), data(tmp_path / "rows.jsonl", "classification")
    steps = ("--steps", "6", "--lr", "0.01", "--rank", "4", "--eval-every", "1", "--batch", "16", "--seed", "3")
    recover(capsys, base, rows, tmp_path / "adapter", "--task", "classification", "--adapter", adapter, "--no-merge", *steps)
    for form in ("merged", "peft-lora"):
        assert run(["export", str(tmp_path / "adapter"), "--to", form, "--output", str(tmp_path / form)]) == 0, capsys.readouterr().err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)  # what is new to it is random
    stock = PeftModel.from_pretrained(plain, str(tmp_path / "peft-lora"))
    assert float((outputs(stock, base) - outputs(merged, base)).abs().max()) <= 1e-5
    start = load_classifier(base, ("few", "many"), seed=3).model
    assert not torch.equal(merged.get_submodule(new).dense.weight, start.get_submodule(new).dense.weight)


def test_rows_longer_than_the_positions_are_cut(tmp_path: Path, capsys: Any) -> None:
    """RoBERTa counts positions from beyond its padding id: 24 of them take 23 tokens."""
    base, rows = encoder(tmp_path / "base", "roberta"), tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{'xo' * 20},{index % 2}\n" for index in range(20)), encoding="utf-8")
    recover(capsys, base, rows, tmp_path / "out", "--task", "classification", "--steps", "2")
    more = ["--task", "classification", "--data", str(rows), "--output", str(tmp_path / "longer")]
    assert run(["recover", str(base), *more, "--seq-len", "24"]) == 2
    assert "--seq-len 24 exceeds the model's context of 23 tokens" in capsys.readouterr().err


@pytest.mark.long
def test_the_same_seed_gives_the_same_bytes_also_when_it_was_stopped(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", "regression")
    before = torch.get_rng_state()
    common = ("--task", "regression", "--steps", "4", "--eval-every", "1", "--dropout", "0.2", "--seed", "4")
    recover(capsys, base, rows, tmp_path / "one", *common)
    assert torch.equal(torch.get_rng_state(), before)
    on_step_end = Pace.on_step_end

    def stop(self: Pace, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Pace, "on_step_end", stop)
        given = ["--data", str(rows), "--output", str(tmp_path / "two"), "--held-out", "0.2", "--quiet", *common]
        assert run(["recover", str(base), *given]) == 130
    assert not (tmp_path / "two").exists()
    recover(capsys, base, rows, tmp_path / "two", *common, "--resume")
    for name in ("model.safetensors", "training_log.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def training_losses(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "training_log.csv").read_text(encoding="utf-8").splitlines())
    return [float(row["train_loss_nats"]) for row in rows if row["train_loss_nats"]]


@pytest.mark.long
def test_accumulated_rows_weigh_alike(tmp_path: Path, capsys: Any) -> None:
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", "regression")
    steps = ("--task", "regression", "--steps", "3", "--eval-every", "1", "--dropout", "0", "--max-grad-norm", "100")
    recover(capsys, base, rows, tmp_path / "whole", "--batch", "8", *steps)
    recover(capsys, base, rows, tmp_path / "parts", "--batch", "4", "--accumulate", "2", *steps)
    whole, parts = (outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / name), base) for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-2)
    # AdamW does not feel the scale of a gradient, and the logged loss shows it: a mean over rows, whether or not they come in parts.
    losses = [training_losses(tmp_path / name) for name in ("whole", "parts")]
    assert len(losses[0]) >= 1
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("adapter", ["lora", "deep_lora"])
def test_what_is_saved_is_measured_on_other_rows(tmp_path: Path, capsys: Any, task: str, adapter: str) -> None:
    """In every form that it is saved in, and as numbers that scikit-learn and SciPy give for the model's own outputs."""
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", task)
    recover(capsys, base, rows, tmp_path / "adapter", "--task", task, "--adapter", adapter, "--no-merge", "--steps", "6", "--lr", "0.01")
    for form in ("merged", "peft-lora"):
        assert run(["export", str(tmp_path / "adapter"), "--to", form, "--output", str(tmp_path / form)]) == 0
    found = []
    for form in ("adapter", "merged", "peft-lora"):
        file = tmp_path / f"{form}.json"
        assert run(["evaluate", str(tmp_path / form), "--data", str(rows), "--json", str(file)]) == 0, capsys.readouterr().err
        found.append(json.loads(file.read_text()))
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    tokens = AutoTokenizer.from_pretrained(base)([r["sentence1"] for r in read], [r["sentence2"] for r in read], return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()(**tokens).logits.double()
    if task == "classification":
        chosen, right = [("few", "many")[index] for index in logits.argmax(-1).tolist()], [r["label"] for r in read]
        expected = {"accuracy": accuracy_score(right, chosen), "macro_f1": f1_score(right, chosen, average="macro")}
    else:
        values, right = logits.squeeze(-1).numpy(), [r["score"] for r in read]
        expected = {"pearson": pearsonr(values, right).statistic, "rmse": float(((values - right) ** 2).mean() ** 0.5)}
    for figures in found:
        assert (figures["task"], figures["rows"]) == (task, 120)
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, abs=1e-4)


def test_measuring_what_does_not_fit_is_one_line(tmp_path: Path, capsys: Any) -> None:
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", "classification")
    recover(capsys, base, rows, tmp_path / "model", "--task", "classification", "--steps", "2")
    numbered, strange = tmp_path / "numbered.csv", tmp_path / "strange.csv"
    numbered.write_text("sentence1,sentence2,label\nxo,a,0\nxx,b,1\n", encoding="utf-8")
    strange.write_text("sentence1,sentence2,label\nxo,a,few\nxx,b,lots\n", encoding="utf-8")
    assert run(["evaluate", str(tmp_path / "model"), "--data", str(numbered)]) == 0
    language = encoder(tmp_path / "language", "llama")
    for arguments, said in (
        ([str(tmp_path / "model"), "--data", str(strange)], "line 3: 'lots' is none of the model's classes: 'few', 'many'"),
        ([str(tmp_path / "model")], "is for labels, not for language; measure it on rows with labels: --data"),
        ([str(base), "--data", str(rows)], "has no head for labels; train one with `regraft recover"),
        ([str(language), "--data", str(rows)], "has no head for labels"),
        ([str(tmp_path / "model"), "--data", str(rows), "--text", "t.txt"], "give one of the two"),
    ):
        capsys.readouterr()
        assert run(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error, error
        assert len(error.strip().splitlines()) == 1


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    base = encoder(tmp_path / "base")
    for classes, labels in ((("a", "b", "c"), (0.0, 2.0, 1.0)), ((), (0.5, -1.5, 3.0))):
        loaded = load_classifier(base, classes)
        rows = Labelled("rows", (("xo", "o"), ("oxoxo", "x"), ("o", "xx")), labels, classes)
        batch = collate_labelled(labelled_examples(rows, loaded.tokenizer, 64), 0)
        ours, theirs = summed_label_loss(loaded.model, batch) / 3, loaded.model(**batch).loss
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_figures_are_those_of_their_formulas() -> None:
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(0, 9, (60,), generator=generator).double().numpy()  # with ties
    second = first + 2 * torch.randn(60, generator=generator, dtype=torch.float64).numpy()
    found = figures_of_numbers(first, second)
    centred = (first - first.mean()) @ (second - second.mean()) / (60 * first.std() * second.std())
    assert found["pearson"] == pytest.approx(centred, abs=1e-12)
    # Ranks with the mean rank for equal values, by counting.
    ranks = [np.array([(values < x).sum() + ((values == x).sum() + 1) / 2 for x in values]) for values in (first, second)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert found["rmse"] == pytest.approx(((first - second) ** 2).mean() ** 0.5)
    equal = figures_of_numbers(np.ones(4), np.arange(4.0))
    assert np.isnan(equal["pearson"])
    assert np.isnan(equal["spearman"])
    assert equal["rmse"] == pytest.approx(1.5**0.5)


BAD = {
    "no data": (["--task", "regression"], "needs texts with labels; give the file with --data"),
    "a teacher": (["--task", "regression", "--data", "ROWS", "--teacher", "dense"], "knows neither --teacher nor --packing"),
    "another task": (["--task", "regresion", "--data", "ROWS"], "--task: should be"),
    "words for numbers": (["--task", "regression", "--data", "ROWS", "--label-column", "sentence2"], "not a number"),
    "fewer rows than a batch": (["--task", "regression", "--data", "ROWS", "--batch", "500"], "fewer than one batch"),
    "a model without a tokenizer": (["--task", "regression", "--data", "ROWS"], "has no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path: Path, capsys: Any, name: str) -> None:
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", "regression")
    arguments, said = BAD[name]
    if "tokenizer" in name:
        for file in base.glob("tokenizer*"):
            file.unlink()
    arguments = [str(rows) if part == "ROWS" else part for part in arguments]
    capsys.readouterr()  # progress bars of what went before
    assert run(["recover", str(base), "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error, error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_head_for_other_classes_is_refused(tmp_path: Path, capsys: Any) -> None:
    base, rows = encoder(tmp_path / "base"), data(tmp_path / "rows.jsonl", "classification")
    recover(capsys, base, rows, tmp_path / "two", "--task", "classification", "--steps", "2")
    again = data(tmp_path / "numbers.jsonl", "regression")
    assert run(["recover", str(tmp_path / "two"), "--task", "regression", "--data", str(again), "--output", str(tmp_path / "x")]) == 2
    assert "train a model without that head" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path / "two")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
