"""A run that is killed and resumed, however often, ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "saw", "two", "birds", "under", "that", "old", "tree", "again")

# Runs a recipe once undisturbed, and again for every moment, where the process kills itself when it is about to make its n-th change
# of the file system (a rename, a new folder, a removal) or when a timer rings. One process forks for all of it, since importing
# takes longer than running.
DRIVER = """
import json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
import torch
from regraft.cli import app
from regraft.cli.run import run as _imported

torch.set_num_threads(1)
recipe, output, moments, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
CALLS = ("rename", "replace", "mkdir", "unlink", "rmdir")

def attempt(folder, at_change=None, after_seconds=None):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        changes = 0
        def counted(name):
            original = getattr(os, name)
            def call(*args, **kwargs):
                nonlocal changes
                changes += 1
                if changes == at_change:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)
            return call
        for name in CALLS:
            setattr(os, name, counted(name))
        if after_seconds is not None:
            threading.Timer(after_seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        started = time.monotonic()
        code = app.run(["run", recipe, "--output", str(folder), "--resume"])
        os.write(write, json.dumps([changes, time.monotonic() - started]).encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        told = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(told) if told else None

def tree(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timings.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

code, (changes, seconds) = attempt(output / "calm")
assert code == 0, code
calm = tree(output / "calm")
draw = random.Random(seed)
plans = [{"at_change": n} for n in sorted(draw.sample(range(1, changes), moments))]
plans += [{"after_seconds": draw.uniform(0.1, 0.9) * seconds} for _ in range(moments // 2)]
report = []
for index, plan in enumerate(plans):
    folder = output / f"killed-{index}"
    code, _ = attempt(folder, **plan)
    stopped = sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []
    again, _ = attempt(folder)
    after = tree(folder)
    different = sorted(name for name in calm.keys() | after.keys() if calm.get(name) != after.get(name))
    report.append({"plan": plan, "code": code, "again": again, "different": different, "stopped": stopped})
    shutil.rmtree(folder)
# Killed again and again, each time at a change drawn anew, until it gets through.
codes = []
folder = output / "often"
while not codes or codes[-1] != 0:
    codes.append(attempt(folder, at_change=draw.randint(2, 60) if len(codes) < 12 else None)[0])
after = tree(folder)
different = sorted(name for name in calm.keys() | after.keys() if calm.get(name) != after.get(name))
report.append({"plan": "often", "code": codes[0], "again": codes[-1], "different": different, "stopped": codes})
print("REPORT " + json.dumps({"files": sorted(calm), "runs": report}))
"""

RECIPE = """
model: {model}
seed: 5
prune: {{ratio: 0.2, samples: 4, seq_len: 16, align: 1, calibration: {text}, shape: {shape}}}
recover: {{data: {text}, steps: 12, batch: 2, seq_len: 16, eval_every: 4, rank: 2, held_out: 0.2, merge: {merge}, quiet: true}}
evaluate: {{text: {text}, window: 16, max_tokens: 300}}
sample: {{prompt: the cat, tokens: 6}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Path]:
    """A model folder with a tokenizer, and a text: both made here in a second."""
    text = tmp_path / "text.txt"
    lines = [" ".join(WORDS[(start * 7 + step * step) % len(WORDS)] for step in range(9)) for start in range(150)]
    text.write_text("\n".join(lines), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.save_pretrained(tmp_path / "model")
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "model")
    return {"model": tmp_path / "model", "text": text}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "merge", "moments"), [("per-layer", "true", 6), ("uniform", "false", 2)])
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(
    tmp_path: Path, tiny: dict[str, Path], shape: str, merge: str, moments: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(**tiny, shape=shape, merge=merge), encoding="utf-8")
    command = [sys.executable, "-c", DRIVER, str(recipe), str(tmp_path / "runs"), str(moments), "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.partition("REPORT ")[2])
    weights = "model/model.safetensors" if merge == "true" else "model/adapter_model.safetensors"
    expected = {weights, "plan.json", "results.json", "report.html", "report.md", "recipe.yaml", "run.json", "samples.json"}
    assert expected <= set(report["files"])
    assert not [name for name in report["files"] if ".regraft" in name or ".before" in name]
    for run in report["runs"]:
        assert run["again"] == 0, f"{run}\n{done.stderr[-3000:]}"
        assert run["different"] == [], run
    killed = [run for run in report["runs"] if run["code"] == -9]
    assert len(killed) >= moments + 1, "too few of the runs were killed to prove anything"
    # Some were stopped inside the training, with a checkpoint to go on from, and some between stages.
    stopped = [name for run in killed for name in run["stopped"] if isinstance(name, str)]
    if moments >= 6:
        assert any("checkpoint-" in name for name in stopped)
    assert any(name == "pruned/manifest.json" for name in stopped)
