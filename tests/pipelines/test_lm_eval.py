"""lm-evaluation-harness by its own command on folders that we write, in processes that know nothing of ours: ``make test-eval``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import regraft
from folders import tiny_tokenizer

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed; make test-eval installs it")

TEXTS = ["the cat sat on a mat and then saw two birds"] * 8
ROWS = [{"question": f"the cat {index}", "choices": ["sat on", "saw two", "and"], "answer": index % 3} for index in range(12)]
TASK = """
task: planted
dataset_path: json
dataset_kwargs: {data_files: {test: q.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def _made(kind: str, folder: Path) -> str:
    """Writes a folder of a kind to ``made`` and returns how the harness is told to load it."""
    model = folder / "model"
    if kind == "factored":
        regraft.compress(model, settings=regraft.CompressSettings(ratio=0.2, method="svd")).save_pretrained(folder / "made")
        return "pretrained=made,trust_remote_code=True"
    if kind == "adapter":
        text = folder / "text.txt"
        text.write_text("\n<|endoftext|>\n".join(TEXTS), encoding="utf-8")
        short: dict[str, Any] = {"steps": 4, "batch": 2, "seq_len": 16, "eval_every": 4, "held_out": 0.25, "lr": 0.05, "quiet": True}
        regraft.recover(model, folder / "made", settings=regraft.RecoverSettings(data=text, merge=False, rank=2, **short))
        return "pretrained=model,peft=made"
    shape: Any = "uniform" if kind == "uniform" else "per-layer"
    pruned = regraft.prune(model, ratio=0.2, criterion="wanda", shape=shape, align=1, calibration=TEXTS, samples=8)
    pruned.save_pretrained(folder / ("pruned" if kind in ("exported", "padded") else "made"))
    if kind in ("exported", "padded"):
        to: Any = "hf" if kind == "exported" else "hf-uniform"
        regraft.export(folder / "pruned", folder / "made", to=to)
    return f"pretrained=made{',trust_remote_code=True' if kind in ('uneven', 'exported') else ''}"


@pytest.mark.parametrize("kind", ["uniform", "uneven", "factored", "adapter", "exported", "padded"])
def test_the_command_of_the_harness_scores_our_folders_as_we_do(kind: str, make_model: Any, tmp_path: Path) -> None:
    make_model("llama-bias", max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "planted.yaml").write_text(TASK, encoding="utf-8")
    where = _made(kind, tmp_path)
    ours = regraft.evaluate_tasks(tmp_path / "made", tasks=(str(tmp_path / "q.jsonl"),))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"{where},dtype=float32",
        "--tasks",
        "planted",
    ]
    command += ["--include_path", "tasks", "--device", "cpu", "--output_path", "out"]
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["planted"]
    assert {one.metric: one.value for one in ours.scores} == {"acc": found["acc,none"], "acc_norm": found["acc_norm,none"]}
