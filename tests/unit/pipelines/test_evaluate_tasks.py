"""Tasks and several texts on folders, in the harness of others too where it is installed: ``make test-eval``."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import regraft
from folders import tiny_tokenizer
from regraft.cli import app
from regraft.errors import DataError, InputError, MissingDependencyError
from regraft.plans import TaskReport

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "saw", "two", "birds")
TEXT = " ".join(WORDS[(index * index + index // 7) % len(WORDS)] for index in range(1500))
QUESTIONS = [
    {"question": f"the {WORDS[index % 11]} and", "choices": [WORDS[(index + shift) % 11] for shift in (1, 4, 6)], "answer": index % 3}
    for index in range(24)
]
HARNESS = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed; make test-eval installs it")
needs_no_harness = pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")


@pytest.fixture
def folder(make_model: Any, tmp_path: Path) -> Path:
    make_model("llama-bias", max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT.upper(), encoding="utf-8")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_tasks_and_texts_are_measured_and_two_models_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = regraft.prune(folder / "model", ratio=0.2, criterion="l2", align=1).save_pretrained(folder / "pruned")
    assert pruned is not None
    out = folder / "out.json"
    tasks = f"continuation,repetition,{folder / 'q.jsonl'}"
    line = ["evaluate", str(folder / "model"), "--tasks", tasks, "--limit", "8", "--text", str(folder / "text.txt"), "--answer-tokens", "8"]
    line += ["--texts", f"{folder / 'text.txt'},{folder / 'other.txt'}", "--windows", "32,128,2048", "--max-tokens", "300"]
    assert app.run([*line, "--against", str(folder / "pruned"), "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "worst text:" in shown
    found = json.loads(out.read_text())
    metrics = [(score["task"], score["metric"], score["items"]) for score in found["scores"]]
    assert metrics[:3] == [("continuation", "acc", 8), ("continuation", "acc_norm", 8), ("repetition", "repeated_4grams", 8)]
    assert [score["stderr"] is not None for score in found["scores"]] == [True] * 5
    windows = {(Path(loss["text"]).name, loss["window_tokens"]) for loss in found["losses"]}  # the context of 256 leaves 2048 out
    assert windows == {("text.txt", 32), ("text.txt", 128), ("other.txt", 32), ("other.txt", 128)}
    assert {one["task"] for one in found["paired"]} == {"continuation", "repetition", str(folder / "q.jsonl")}
    assert found["against"]["parameters"] < found["parameters"]
    alone = regraft.evaluate(folder / "model", text=folder / "other.txt", window=128, max_tokens=300)
    same = next(loss for loss in found["losses"] if "other" in loss["text"] and loss["window_tokens"] == 128)
    assert same["loss_nats"] == alone.loss.loss_nats


@needs_no_harness
def test_without_the_harness_its_tasks_are_refused(folder: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"regraft\[eval\]"):
        regraft.evaluate_tasks(folder / "model", tasks=("boolq",))


def test_what_cannot_be_measured_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="nothing is measured"):
        regraft.evaluate_tasks(folder / "model")
    with pytest.raises(DataError, match="does not exist"):
        regraft.evaluate_tasks(folder / "model", tasks=("missing.jsonl",))
    with pytest.raises(InputError, match="is a text"):
        regraft.evaluate_tasks(folder / "model", tasks=("text.txt",))
    assert app.run(["evaluate", str(folder / "model"), "--against", "other"]) == 2
    assert "name some: --tasks continuation" in capsys.readouterr().err


@HARNESS
def test_an_unknown_task_has_a_suggestion(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'boolq'"):
        regraft.evaluate_tasks(folder / "model", tasks=("boolqq",))


def harness_yaml(folder: Path) -> Path:
    """The questions of the file as a task of lm-evaluation-harness, which reads them by its own code."""
    lines = [
        "task: planted",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {folder / 'q.jsonl'}}}}}",
        "test_split: test",
        "output_type: multiple_choice",
        "doc_to_text: '{{question}}'",
        "doc_to_choice: choices",
        "doc_to_target: answer",
        "metric_list: [{metric: acc}, {metric: acc_norm}]",
        "metadata: {version: 3.0}",
    ]
    path = folder / "planted.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_the_harness_and_ours_agree_on_every_item_of_every_kind_of_model(folder: Path) -> None:
    dense = regraft.load(folder / "model")
    some: Any = {"align": 1, "calibration": TEXT.split("saw"), "samples": 8}
    uneven = regraft.prune(folder / "model", ratio=0.2, criterion="wanda", shape="per-layer", **some)
    uneven.save_pretrained(folder / "uneven")
    factored = regraft.compress(folder / "model", settings=regraft.CompressSettings(ratio=0.2, method="svd"))
    factored.save_pretrained(folder / "factored")
    for model in (dense.model, folder / "uneven", folder / "factored"):
        tokenizer = None if isinstance(model, Path) else dense.tokenizer
        ours: TaskReport = regraft.evaluate_tasks(model, tasks=(str(folder / "q.jsonl"),), tokenizer=tokenizer)
        theirs: TaskReport = regraft.evaluate_tasks(model, tasks=(str(harness_yaml(folder)),), tokenizer=tokenizer)
        assert [(one.metric, one.outcomes, one.items) for one in ours.scores] == [
            (one.metric, one.outcomes, one.items) for one in theirs.scores
        ]
        assert [one.stderr for one in ours.scores] == pytest.approx([one.stderr for one in theirs.scores])
        assert theirs.scores[0].version == "3.0"
        assert "lm_eval" in theirs.versions
