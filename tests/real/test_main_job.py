"""The main job on a model that nobody here trained: prune, recover, save, and load in fresh processes in every promised way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from regraft.data.text import Corpus, read_corpus
from regraft.evaluation.loss import evaluate_loss
from regraft.models.load import load
from regraft.pipelines.prune.prune import prune
from regraft.pipelines.recover import recover_model
from regraft.settings import EvaluateSettings, PruneSettings, RecoverSettings

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "data" / "tinystories" / "train.txt"
MODEL = SHARED / "models" / "stories3M"

pytestmark = pytest.mark.skipif(not (STORIES.is_file() and MODEL.is_dir()), reason=f"no real model and text in {SHARED}")

# Loads a folder, runs it and generates greedily with and without a KV cache. `regraft` is out of reach where it is not wanted: a
# finder in front of all others says that there is no such module.
FRESH = """
import sys
from importlib.abc import MetaPathFinder
way, folder, tensors = sys.argv[1:]
class Nowhere(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "regraft":
            raise ModuleNotFoundError("regraft is not installed")
if way == "regraft":
    import regraft
else:
    sys.meta_path.insert(0, Nowhere())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=way == "remote code").eval()
AutoTokenizer.from_pretrained(folder)
ids = load_file(tensors)["ids"]
with torch.no_grad():
    logits = model(ids).logits
    runs = [model.generate(ids[:1, :6], max_new_tokens=24, do_sample=False, use_cache=cached) for cached in (True, False)]
assert torch.equal(*runs), "generate with a KV cache differs from generate without"
assert runs[0].shape[1] > 6
save_file({"logits": logits}, tensors + ".out")
print(type(model).__name__)
"""


def fresh_logits(way: str, folder: Path, ids: torch.Tensor, work: Path) -> tuple[str, torch.Tensor]:
    """Returns the class and the logits of a saved model in a process that knows nothing of this one."""
    tensors = work / "ids.safetensors"
    save_file({"ids": ids}, tensors)
    done = subprocess.run([sys.executable, "-c", FRESH, way, str(folder), str(tensors)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1], load_file(f"{tensors}.out")["logits"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stories to calibrate on, to train on and to measure on; no story is in two of them."""
    documents = read_corpus(STORIES, "train").documents
    folder = tmp_path_factory.mktemp("texts")
    parts = {"calibration": documents[:300], "training": documents[300:1400], "held-out": documents[2000:2030]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text("<|endoftext|>".join(part), encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in parts}


def held_out_loss(folder: Path, texts: dict[str, Path]) -> float:
    loaded = load(folder)
    corpus: Corpus = read_corpus(texts["held-out"], "test")
    assert loaded.tokenizer is not None
    return evaluate_loss(loaded.model, loaded.tokenizer, corpus, EvaluateSettings(window=256)).loss_nats


@pytest.mark.long
@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_prune_recover_save_and_load_everywhere(shape, texts, tmp_path):
    # The longest re-fit once is enough.
    refit = {"uniform": "least_squares", "per-layer": "auto"}[shape]
    settings = PruneSettings(ratio=0.2, criterion="taylor", reconstruct=refit, shape=shape, calibration=texts["calibration"], samples=16)
    pruned, recovered = tmp_path / "pruned", tmp_path / "recovered"
    result = prune(MODEL, pruned, settings, seed=1)
    assert abs(result.plan.achieved - 0.2) < 0.01
    training = RecoverSettings(data=texts["training"], steps=12, batch=8, seq_len=128, lr=2e-3, eval_every=6)
    recover_model(pruned, recovered, training, seed=1)
    losses = {name: held_out_loss(path, texts) for name, path in {"dense": MODEL, "pruned": pruned, "recovered": recovered}.items()}
    assert losses["dense"] < losses["recovered"] < losses["pruned"]

    ids = torch.tensor([AutoTokenizer.from_pretrained(MODEL)(texts["held-out"].read_text(encoding="utf-8")[:2000]).input_ids[:96]])
    for folder in (pruned, recovered):
        with torch.no_grad():
            want = load(folder).model(ids).logits
        ways = {"uniform": ["plain", "regraft"], "per-layer": ["regraft", "remote code"]}[shape]
        for way in ways if folder == recovered else ways[1:]:
            found, logits = fresh_logits(way, folder, ids, tmp_path)
            assert (logits - want).abs().max() <= 1e-5, way
            assert found.startswith("Regraft") == (shape == "per-layer")
    with torch.no_grad():
        assert (result.model(ids).logits - AutoModelForCausalLM.from_pretrained(pruned)(ids).logits).abs().max() <= 1e-5

    record = json.loads((recovered / "regraft.json").read_text(encoding="utf-8"))
    assert record["seed"] == 1
    assert record["parents"][-1]["plan"]["cuts"], "the plan of the pruning travels with the recovered model"
    assert "What was done" in (recovered / "README.md").read_text(encoding="utf-8")
