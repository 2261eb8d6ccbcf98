from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.data.text import read_corpus
from regraft.errors import ConfigError, OutputError, RegraftError
from regraft.evaluation.loss import evaluate_loss
from regraft.models.load import load, require_tokenizer
from regraft.models.view import parameter_count
from regraft.pipelines.run.run import run
from regraft.plans import RankPlan, from_json
from regraft.settings import EvaluateSettings

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw", "two", "birds", "under", "that", "old", "tree", "again"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    documents = [" ".join(WORDS[(start * 5 + step * step) % len(WORDS)] for step in range(40)) for start in range(20)]
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    folder = tmp_path / "tiny"
    make_model("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, model: Path, text: Path) -> Callable[..., Path]:
    """Returns ``recipe(**sections)``: a recipe file; a section that is None is left out."""

    def write(**sections: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(model),
            "seed": 3,
            "prune": {"ratio": 0.2, "criterion": "l2", "calibration": str(text), "samples": 4, "seq_len": 16, "align": 1},
            "allocate": None,
            "recover": {"data": str(text), "steps": 6, "batch": 2, "seq_len": 16, "eval_every": 3, "rank": 2, "quiet": True},
            "evaluate": {"text": str(text), "window": 16, "stride": 16, "max_tokens": 200},
            "sample": {"prompt": "the cat", "tokens": 4},
        }
        for name, section in sections.items():
            values[name] = (values.get(name) or {}) | section if isinstance(section, dict) else section
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}), encoding="utf-8")
        return path

    return write


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_from_beginning_to_end(tmp_path: Path, recipe: Callable[..., Path], text: Path) -> None:
    said: list[str] = []
    result = run(recipe(), tmp_path / "run", say=said.append)
    assert result.path == tmp_path / "run"
    assert result.plan is not None
    assert result.report is not None
    assert 0.1 < result.plan.achieved <= 0.25
    assert list(result.measurements) == ["dense", "pruned", "recovered"]
    assert {"recipe.yaml", "plan.json", "results.json", "samples.json", "report.html", "report.md"} <= names(tmp_path / "run")
    assert [line for line in said if line.endswith("…")] == [
        "prune …",
        "recover …",
        "measure dense …",
        "measure pruned …",
        "measure recovered …",
    ]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    settings = EvaluateSettings(text=text, window=16, stride=16, max_tokens=200)
    for label, folder in (("pruned", tmp_path / "run" / "pruned"), ("recovered", tmp_path / "run" / "model")):
        loaded = load(folder)
        again = evaluate_loss(loaded.model, require_tokenizer(loaded), read_corpus(text, "test"), settings)
        assert results[label]["loss_nats"] == again.loss_nats
        assert results[label]["parameters"] == parameter_count(loaded.model) == result.plan.parameters_after
    cost = results["pruned"]["loss_nats"] - results["dense"]["loss_nats"]
    gain = results["pruned"]["loss_nats"] - results["recovered"]["loss_nats"]
    assert results["recovered"]["cost_nats"] == pytest.approx(cost)
    assert results["recovered"]["gain_nats"] == pytest.approx(gain)
    assert gain > 0
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert set(samples) == {"prompt", "dense", "pruned", "recovered"}


@pytest.mark.long
def test_ranks_are_found_between_pruning_and_recovery(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    search = {"budget": "r=2", "ranks": [1, 2, 3], "trials": 3, "cost": 3, "elastic": 0, "samples": 4, "confirm_seeds": 2}
    kept = {"rank": 8, "held_out": 0.2, "held_out_windows": 4, "merge": False}
    path = recipe(allocate=search, recover=kept)
    said: list[str] = []
    result = run(path, tmp_path / "run", say=said.append)
    assert [line for line in said if line.endswith("…")][:3] == ["prune …", "allocate …", "recover …"]
    plan = from_json(RankPlan, (tmp_path / "run" / "ranks" / "ranks.json").read_bytes())
    trained = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert {name: trained["rank_pattern"].get(name, trained["r"]) for name in plan.ranks} == dict(plan.ranks)
    assert json.loads((tmp_path / "run" / "model" / "recovery.json").read_text())["trainable_parameters"] == plan.trainable_parameters
    assert result.report is not None
    assert result.report.ranks is not None
    assert result.report.ranks.verdict in (tmp_path / "run" / "report.md").read_text()
    assert escape(result.report.ranks.verdict) in (tmp_path / "run" / "report.html").read_text()
    again: list[str] = []
    run(path, tmp_path / "run", resume=True, say=again.append)
    assert not any(line.endswith("…") for line in again)
    for name in names(tmp_path / "run"):
        assert str(tmp_path / "run").encode() not in (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.long
def test_the_folder_tells_nothing_of_where_it_stands(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    run(recipe(), tmp_path / "somewhere-special")
    folder = tmp_path / "somewhere-special"
    for name in names(folder):
        assert b"somewhere-special" not in (folder / name).read_bytes(), name


@pytest.mark.long
def test_stages_that_are_left_out(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    measured_only = run(recipe(prune=None, recover=None, sample=None), tmp_path / "a")
    assert list(measured_only.measurements) == ["dense"]
    assert not (tmp_path / "a" / "model").exists()
    pruned_only = run(recipe(recover=None, sample=None), tmp_path / "b")
    assert list(pruned_only.measurements) == ["dense", "pruned"]
    assert load(tmp_path / "b" / "model").provenance is not None
    tuned_only = run(recipe(prune=None), tmp_path / "c")
    assert list(tuned_only.measurements) == ["dense", "recovered"]
    assert tuned_only.plan is None


@pytest.mark.long
def test_speeds_are_measured_together_and_kept_apart(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    result = run(recipe(recover=None, sample=None, evaluate={"speed": True}), tmp_path / "run")
    speeds = [entry.speed for entry in result.measurements.values()]
    assert all(speed is not None and speed.decode_seconds_per_token > 0 for speed in speeds)
    assert "speed" not in json.loads((tmp_path / "run" / "measured" / "dense" / "measurement.json").read_text()) or (
        json.loads((tmp_path / "run" / "measured" / "dense" / "measurement.json").read_text())["speed"] is None
    )
    again = run(recipe(recover=None, sample=None, evaluate={"speed": True}), tmp_path / "run", resume=True)
    assert again.measurements == result.measurements


@pytest.mark.long
def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    before = names(tmp_path)
    monkeypatch.chdir(tmp_path)
    dry = run(path, dry_run=True)
    assert names(tmp_path) == before
    assert dry.path is None
    assert dry.plan is not None
    assert dry.sizes["dense"].parameters == dry.plan.parameters_before
    assert dry.sizes["pruned"].parameters == dry.plan.parameters_after
    wet = run(path, tmp_path / "run")
    assert wet.plan == dry.plan


@pytest.mark.slow
def test_the_default_folder_is_named_after_the_recipe(tmp_path: Path, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(recipe(prune=None, recover=None, sample=None))
    assert result.path == Path("runs/tiny")
    assert (tmp_path / "runs" / "tiny" / "results.json").is_file()


@pytest.mark.slow
def test_overrides_reach_the_stages_and_the_record(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    result = run(recipe(), tmp_path / "run", overrides=["recover=null", "prune.ratio=0.3", "sample=null"])
    assert result.plan is not None
    assert result.plan.ratio == 0.3
    assert "prune.ratio=0.3" in json.loads((tmp_path / "run" / "model" / "regraft.json").read_text())["command"]
    assert result.recipe.recover is None


@pytest.mark.slow
def test_other_contents_of_a_file_are_another_run(tmp_path: Path, recipe: Callable[..., Path], text: Path) -> None:
    path = recipe(recover=None, sample=None)
    run(path, tmp_path / "run")
    text.write_text(text.read_text() + " and more", encoding="utf-8")
    with pytest.raises(OutputError, match=r"begun differently: contents of\.evaluate\.text was "):
        run(path, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_another_model_is_another_run(tmp_path: Path, recipe: Callable[..., Path], model: Path, make_model: Any) -> None:
    path = recipe(recover=None, sample=None)
    run(path, tmp_path / "run")
    other = make_model("qwen2")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    other.save_pretrained(model)
    with pytest.raises(OutputError, match="fingerprint of the model was "):
        run(path, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"prune": {"layers": "7:"}}, "prune.layers: `layers=7:` names no layer of this model's 3"),
        ({"prune": {"seq_len": 1000}}, "prune.seq_len: `seq_len=1000` exceeds the model's context of 64 tokens"),
        ({"recover": {"seq_len": 65}}, "recover.seq_len: `seq_len=65` exceeds the model's context"),
        ({"recover": {"adapter": "lroa"}}, "unknown adapter 'lroa'; known: "),
        ({"recover": {"report_to": ["wandbb"]}}, "recover.report_to: unknown tracker 'wandbb'"),
        ({"evaluate": {"window": 65, "stride": 1}}, "evaluate.window: `window=65` exceeds the model's context of 64"),
        ({"prune": {"ratio": 0.999}}, "0.999"),
        ({"model": "nowhere/at-all/here"}, "nowhere/at-all/here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, recipe: Callable[..., Path], sections: dict[str, Any], words: str
) -> None:
    path = recipe(**sections)
    before = names(tmp_path)
    with pytest.raises(RegraftError) as caught:
        run(path, tmp_path / "deep" / "run")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("calibration", b"x"),  # shorter than a window
        *((key, content) for key in ("calibration", "data", "text") for content in (b"", b"  \n", b"\x00\x01binary")),
    ],
)
def test_bad_text_is_found_before_anything_is_written(tmp_path: Path, recipe: Callable[..., Path], key: str, content: bytes) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    section = {"calibration": "prune", "data": "recover", "text": "evaluate"}[key]
    extra = {"criterion": "taylor"} if key == "calibration" else {}
    path = recipe(**{section: {key: str(bad), **extra}})
    before = names(tmp_path)
    with pytest.raises(RegraftError) as caught:
        run(path, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    path = recipe(prune={"layers": "9:", "seq_len": 65}, recover={"seq_len": 66}, evaluate={"window": 100})
    with pytest.raises(ConfigError) as caught:
        run(path, tmp_path / "run")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "prune.layers",
        "prune.seq_len",
        "recover.seq_len",
        "evaluate.window",
    ]


@pytest.mark.slow
def test_a_model_without_tokenizer_or_with_nan_is_refused(
    tmp_path: Path, recipe: Callable[..., Path], model: Path, make_model: Any
) -> None:
    path = recipe()
    for file in model.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(RegraftError, match="has no tokenizer"):
        run(path, tmp_path / "run")
    for file in tmp_path.glob("tokenizer*"):
        file.rename(model / file.name)
    broken = make_model("qwen2")
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    broken.save_pretrained(model)
    with pytest.raises(RegraftError, match=r"[Nn]a[Nn]|not finite"):
        run(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_exists_is_refused_before_the_model_is_loaded(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        run(recipe(model="nowhere/at-all"), tmp_path / "run")
    assert names(tmp_path / "run") == {"mine"}


@pytest.mark.slow
def test_every_model_is_scored_on_tasks_and_texts(recipe: Callable[..., Path], tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"{WORDS[(step * step) % len(WORDS)]}{step}" for step in range(400)), encoding="utf-8")
    file = tmp_path / "q.jsonl"
    rows = [{"question": "the cat", "choices": ["sat", "saw"], "answer": number % 2} for number in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = {"tasks": ["repetition", str(file)], "limit": 3, "answer_tokens": 4, "texts": [str(words)], "windows": [8, 16]}
    source = recipe(recover=None, sample=None, evaluate={"text": str(words)}, tasks=tasks)
    done = run(source, tmp_path / "run")
    assert done.report is not None
    dense, pruned = done.report.tasks
    assert (dense.label, pruned.label) == ("dense", "pruned")
    assert [(one.metric, one.items) for one in pruned.scores] == [("repeated_4grams", 3), ("acc", 3), ("acc_norm", 3)]
    assert [loss.window_tokens for loss in pruned.losses] == [8, 16]
    assert f"| {file}, acc (3 items, version 1) |" in (tmp_path / "run" / "report.md").read_text()
    said: list[str] = []
    run(source, tmp_path / "run", resume=True, say=said.append)
    assert any(line.startswith("tasks dense: finished before") for line in said)
    with pytest.raises(ConfigError, match=r"tasks .*: no file at 'gone\.jsonl'"):
        run(recipe(tasks=tasks | {"tasks": ["gone.jsonl"]}), tmp_path / "other")
