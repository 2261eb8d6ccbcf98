"""What is saved loads in a fresh process with the same logits: by transformers, with regraft, and by the folder's own code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fresh
from regraft.models.build import build
from regraft.models.card import model_card
from regraft.models.provenance import versions
from regraft.models.save import save
from regraft.plans import Provenance
from slicing import Kept, ids, sliced

SHAPES = {
    "uniform": [Kept((0, 2), range(1, 49, 2)), Kept((1, 2), range(24)), Kept((0, 1), range(40, 64))],
    "uneven": [Kept((1,), range(0, 64, 3)), Kept((0, 1, 2), range(64)), Kept((0, 2), range(7, 50))],
    "removed": [Kept((), range(0, 64, 3)), Kept((0, 2), ()), Kept((), ())],
}

# Runs elsewhere: reads folders, compares with the logits beside them, and tells what it found.
READER = """
import json, socket, sys

def refuse(*_, **__):
    raise RuntimeError("the network was touched")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "regraft":
            raise ModuleNotFoundError("regraft is not installed here")

mode = sys.argv[1]
if mode == "regraft":
    import regraft
else:
    sys.meta_path.insert(0, Absent())

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=mode == "own-code", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    expected = load_file(folder + "/expected.safetensors")
    x = expected["ids"]
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    with_cache = model.generate(x[:, :6], use_cache=True, **settings)
    found[folder] = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "difference": float((model(x).logits - expected["logits"]).abs().max()),
        "generated_alike": bool(torch.equal(with_cache, model.generate(x[:, :6], use_cache=False, **settings))),
        "generated_as_saved": bool(torch.equal(with_cache, expected["generated"])),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
    }
    again = folder + "-again"
    model.save_pretrained(again)
    assert "regraft" not in sys.modules or mode == "regraft"
print(json.dumps(found))
"""


def provenance(command: str = "test") -> Provenance:
    return Provenance(command, "tiny", "0" * 16, 0, versions())


def saved(make_model, root: Path, family: str, shape: str, *, tied: bool = False) -> Path:
    model = make_model(family, tie_word_embeddings=tied)
    model = build(model, *sliced(model, SHAPES[shape]))
    folder = root / f"{family}-{shape}-{'tied' if tied else 'untied'}"
    save(model, None, folder, provenance(), model_card(provenance()))
    x = ids(model)
    with torch.no_grad():
        generated = model.generate(x[:, :6], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        save_file({"ids": x, "logits": model(x).logits, "generated": generated}, folder / "expected.safetensors")
    return folder


def read_elsewhere(mode: str, folders: list[Path]) -> dict[str, dict[str, object]]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if mode == "regraft":
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    done = fresh.run(["-c", READER, mode, *map(str, folders)], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(name).name: facts for name, facts in found.items()}


VARIANTS = ("llama", "llama-bias", "mistral", "mistral-window", "qwen2", "qwen3")
STOCK = {
    "llama": "LlamaForCausalLM",
    "llama-bias": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral-window": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@pytest.mark.long
@pytest.mark.parametrize("mode", ["plain", "regraft", "own-code"])
def test_loads_in_a_fresh_process(make_model, tmp_path, mode):
    shapes = {"plain": ("uniform",), "regraft": ("uniform", "uneven", "removed"), "own-code": ("uneven", "removed")}[mode]
    folders = [saved(make_model, tmp_path, family, shape) for family in VARIANTS for shape in shapes]
    folders += [saved(make_model, tmp_path, "llama", shape, tied=True) for shape in shapes]
    found = read_elsewhere(mode, folders)
    assert len(found) == len(folders)
    for name, facts in found.items():
        shape = name.split("-")[-2]
        family = name.removesuffix(f"-{shape}-tied").removesuffix(f"-{shape}-untied")
        assert facts["difference"] < 1e-5, name
        assert facts["generated_alike"], name
        assert facts["generated_as_saved"], name
        assert facts["tied"] == name.endswith("-tied"), name
        assert facts["class"] == ("" if shape == "uniform" else "Regraft") + STOCK[family], name
        start = {
            "plain": "transformers.models.",
            "regraft": ("regraft.", "transformers.models."),
            "own-code": "transformers_modules.",
        }
        assert str(facts["module"]).startswith(start[mode]), name
    for folder in folders:
        # The code travels on when what was loaded is saved again, and the folder still says how to load it.
        again = folder.with_name(f"{folder.name}-again")
        config = json.loads((again / "config.json").read_text(encoding="utf-8"))
        travels = "uniform" not in folder.name
        assert (again / "modeling_regraft.py").is_file() == (again / "configuration_regraft.py").is_file() == travels
        assert ("auto_map" in config) == travels
        if travels:
            assert config["per_layer_config"] == json.loads((folder / "config.json").read_text())["per_layer_config"]
            assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


def test_the_negative_control_without_code_or_regraft(make_model, tmp_path):
    folder = saved(make_model, tmp_path, "llama", "uneven")
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"auto_map"', '"no_auto_map"'), encoding="utf-8")
    with pytest.raises(AssertionError, match="regraft_llama"):
        read_elsewhere("plain", [folder])
