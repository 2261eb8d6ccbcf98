"""Saving: whole or not at all, with everything that tells how the folder came to be."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fresh
from folders import UNEVEN, provenance, tiny_tokenizer
from regraft.atomic import sha256_of
from regraft.errors import ModelError, OutputError
from regraft.models.build import build
from regraft.models.card import model_card
from regraft.models.load import load
from regraft.models.provenance import parents_of, provenance_text, read_provenance, versions
from regraft.models.save import save
from regraft.plans import Cut, Provenance, PrunePlan
from slicing import files_of, ids, sliced

WEIGHTS = {"model.safetensors", "config.json", "generation_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
OURS = {"README.md", "regraft.json"}
CODE = {"modeling_regraft.py", "configuration_regraft.py", "factored_regraft.py"}


def write(model, folder, **settings):
    return save(model, tiny_tokenizer(), folder, provenance(), model_card(provenance()), **settings)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_what_is_in_the_folder(make_model, tmp_path, uneven):
    model = make_model("llama")
    if uneven:
        model = build(model, *sliced(model, UNEVEN))
    written = write(model, tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == WEIGHTS | TOKENIZER | OURS | (CODE if uneven else set())
    assert written.files == {"model.safetensors": sha256_of(tmp_path / "out" / "model.safetensors")}
    assert read_provenance(tmp_path / "out") == written
    assert os.listdir(tmp_path) == ["out"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~_umask()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_names_that_checkpoints_of_a_family_have_had_all_along(make_model, tmp_path, tied):
    """GPT-NeoX keeps its head under another name in files than in memory."""
    model = make_model("gpt_neox", tie_word_embeddings=tied).eval()
    write(model, tmp_path / "out")
    assert ("embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    loaded = load(tmp_path / "out").model
    assert torch.equal(loaded(ids(model)).logits, model(ids(model)).logits)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_without_a_tokenizer(make_model, tmp_path):
    save(make_model("qwen3"), None, tmp_path / "out", provenance(), "")
    assert set(files_of(tmp_path / "out")) == WEIGHTS | OURS


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(make_model, tmp_path):
    for name in ("a", "b"):
        write(build(make_model("llama"), *sliced(make_model("llama"), UNEVEN)), tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.slow
def test_weights_that_were_cut_in_place_are_saved_as_they_are(make_model, tmp_path):
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight[:20].clone())
    mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight[:20].clone())
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :20].clone())
    write(model, tmp_path / "out")
    again = load(tmp_path / "out").model
    x = ids(model)
    torch.testing.assert_close(again(x).logits, model(x).logits, atol=1e-6, rtol=0)
    assert type(again).__name__ == "RegraftLlamaForCausalLM"


def test_a_generation_config_that_transformers_refuses_to_write(make_model, tmp_path):
    model = make_model("llama")
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    write(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)


def test_says_nothing_on_the_terminal(make_model, tmp_path, capfd):
    model = make_model("llama")
    capfd.readouterr()
    write(model, tmp_path / "out")
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


def test_an_existing_folder_is_refused_or_replaced(make_model, tmp_path):
    model = make_model("llama")
    write(model, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(OutputError, match="exists; choose another"):
        write(model, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    (tmp_path / "out" / "left over.txt").write_text("")
    write(model, tmp_path / "out", replace=True)
    after = files_of(tmp_path / "out")
    assert set(after) == set(before)
    assert after["model.safetensors"] != before["model.safetensors"]


# --- a disk that fills up

FULL = {
    "weights, in Rust": (
        transformers.modeling_utils,
        "safe_save_file",
        SafetensorError("I/O: No space left on device (os error 28)"),
    ),
    "weights, in Python": (transformers.modeling_utils, "safe_save_file", OSError(errno.ENOSPC, "No space left on device")),
    "config": (transformers.PreTrainedConfig, "to_json_file", OSError(errno.ENOSPC, "No space left on device")),
    "tokenizer": (transformers.PreTrainedTokenizerFast, "save_pretrained", Exception("No space left on device (os error 28)")),
    "card": (Path, "write_text", OSError(errno.ENOSPC, "No space left on device")),
    "flush": (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
    "quota": (os, "fsync", OSError(errno.EDQUOT, "Disk quota exceeded")),
}


@pytest.mark.parametrize("where", sorted(FULL))
@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_a_full_disk_leaves_what_was_there(make_model, tmp_path, monkeypatch, where, there):
    model = make_model("llama")
    if there:
        write(model, tmp_path / "out")
    before = files_of(tmp_path)
    holder, name, error = FULL[where]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(holder, name, fail)
    with pytest.raises(OutputError, match=r"the disk is full while writing .*; nothing was changed"):
        write(model, tmp_path / "out", replace=True)
    monkeypatch.undo()
    assert files_of(tmp_path) == before
    assert (tmp_path / "out").exists() == there


FILLS_UP = """
import resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from folders import provenance, tiny_tokenizer
from regraft.errors import OutputError
from regraft.models.load import load
from regraft.models.save import save

loaded = load({source!r})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (100_000, 400, 60):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save(loaded.model, loaded.tokenizer, Path({target!r}), provenance(), "card", replace=True)
    except OutputError as error:
        print(error)
"""


def test_files_that_cannot_grow(make_folder, tmp_path):
    """The operating system itself refuses, at three sizes; the signal that comes with it does not kill the process."""
    source = make_folder("llama")
    target = tmp_path / "out"
    write(load(source).model, target)
    before = files_of(tmp_path)
    code = FILLS_UP.format(paths=[entry for entry in sys.path if entry], source=str(source), target=str(target))
    done = fresh.run(["-c", code])
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 3
    assert all("the disk is full while writing" in line for line in lines)
    assert files_of(tmp_path) == before


def test_what_cannot_be_read_back_is_not_kept(make_model, tmp_path, monkeypatch):
    model = make_model("llama")
    real = transformers.modeling_utils.safe_save_file

    def drop_one(tensors, file, **settings):
        return real({name: t for name, t in tensors.items() if name != "model.norm.weight"}, file, **settings)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", drop_one)
    with pytest.raises(OutputError, match=r"'model\.norm\.weight' was not written"):
        write(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the record and the card


def test_the_record_says_where_a_model_comes_from():
    plan = PrunePlan("f", "l2", "global", "per-layer", 0.25, 16, 100, 75, (Cut("layers.0.ffn", tuple(range(30))),))
    first = Provenance("regraft prune", "maker/model", "abc", 3, versions(), plan=plan, settings={"align": 16})
    text = provenance_text(first)
    assert "[0, 1, 2, 3, 4," in text  # a list of numbers stays on one line
    assert json.loads(text)["plan"]["cuts"][0]["kept"] == list(range(30))
    second = Provenance("regraft recover", "runs/pruned", "def", 3, versions(), parents=parents_of(first))
    third = parents_of(second)
    assert [parent["command"] for parent in third] == ["regraft prune", "regraft recover"]
    assert third[0]["plan"]["ratio"] == 0.25
    assert parents_of(None) == ()
    assert versions()["torch"] == torch.__version__
    assert versions()["transformers"] == transformers.__version__


def test_a_folder_that_we_did_not_make_has_no_record(tmp_path):
    assert read_provenance(tmp_path) is None
    (tmp_path / "regraft.json").write_text('{"command": "x"}')
    with pytest.raises(ModelError, match=r"regraft\.json' is damaged"):
        read_provenance(tmp_path)


def front_matter(text: str) -> dict[str, object]:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_card(make_model, tmp_path):
    model = build(make_model("llama"), *sliced(make_model("llama"), UNEVEN))
    record = Provenance("regraft prune a --ratio 0.2 | cat", "maker/model", "abc", 3, {"torch": "1"})
    save(model, None, tmp_path / "out", record, model_card(record, {"share removed": "20.0 %", "odd|name": "a\nb"}))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    head = front_matter(text)
    assert head["library_name"] == "transformers"
    assert head["base_model"] == "maker/model"
    assert "regraft" in head["tags"]
    assert "| share removed | 20.0 % |" in text
    assert "| odd\\|name | a b |" in text
    assert "| 0 | 2 | 1 | 8 | 22 |" in text
    assert "| 1 | 6 | 3 | 8 | 64 |" in text
    assert "trust_remote_code=True" in text
    code = text.split("```python\n")[1].split("```")[0]
    assert "import regraft" in code
    namespace: dict[str, object] = {"FOLDER": str(tmp_path / "out")}
    exec(compile(code, "card", "exec"), namespace)  # what the card says works
    assert type(namespace["model"]).__name__ == "RegraftLlamaForCausalLM"


@pytest.mark.parametrize("source", ["seedling", "/a/folder", "runs/one/two"])
def test_a_local_source_is_no_base_model(source):
    card = model_card(Provenance("c", source, "abc", 0, {}))
    assert "base_model" not in front_matter(card)


def test_the_card_of_a_stock_model_needs_no_regraft(make_model, tmp_path):
    write(make_model("qwen2"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "import regraft" not in text
    assert "plain `Qwen2ForCausalLM`" in text
    assert "| 0 to 2 | 6 | 3 | 8 | 64 |" in text


def test_stock_transformers_reads_the_tokenizer(make_model, tmp_path):
    write(make_model("llama"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("ab") == tiny_tokenizer().encode("ab")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
