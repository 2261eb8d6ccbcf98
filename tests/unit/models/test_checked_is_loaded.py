"""What is loaded is what was checked: no pickle is reachable, nothing outside of a folder is read; and fingerprints see every value."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import edit_json
from regraft.errors import InputError, ModelError
from regraft.groups.discover import discover
from regraft.models.load import load
from regraft.models.view import ModelView, fingerprint
from regraft.streaming.skeleton import open_skeleton


class Ran:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def folder(make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder, in a process where no pickle can be read."""

    def no_pickle(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"torch.load was reached: {args}")

    monkeypatch.setattr(torch, "load", no_pickle)
    return make_folder("llama")


def pickled(path: Path, tmp_path: Path) -> None:
    path.write_bytes(pickle.dumps(Ran(tmp_path / "ran")))


def names_another_file(folder: Path, tmp_path: Path) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")


def names_a_pickle(folder: Path, tmp_path: Path) -> None:
    pickled(folder / "weights.bin", tmp_path)
    edit_json(folder / "config.json", transformers_weights="weights.bin")


def has_pickles_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", tmp_path)


def has_an_index_of_pickles(folder: Path, tmp_path: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", tmp_path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def has_an_index_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    names = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def has_a_record_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    record = {"command": "", "source": "", "source_fingerprint": "", "seed": 0, "versions": {}, "files": {"../secret": "0" * 64}}
    (folder / "regraft.json").write_text(json.dumps(record))


def has_a_record_of_an_absolute_path(folder: Path, tmp_path: Path) -> None:
    has_a_record_that_leads_outside(folder, tmp_path)
    edit_json(folder / "regraft.json", files={"/proc/self/environ": "0" * 64})


REFUSED = [
    names_another_file,
    names_a_pickle,
    has_pickles_alone,
    has_an_index_of_pickles,
    has_an_index_that_leads_outside,
    has_a_record_that_leads_outside,
    has_a_record_of_an_absolute_path,
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_leads_elsewhere_is_refused_in_one_line(folder: Path, tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    change(folder, tmp_path)
    for way in (load, open_skeleton):
        with pytest.raises(ModelError) as caught:
            way(folder)
        assert str(caught.value).isprintable()
    assert not (tmp_path / "ran").exists()


def has_an_adapter_beside(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA", "r": 2}))
    pickled(folder / "adapter_model.bin", tmp_path)


def has_pickles_beside(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.bin", ".metadata", "optimizer.pt"):
        pickled(folder / name, tmp_path)


def has_a_distributed_checkpoint_beside(folder: Path, tmp_path: Path) -> None:
    (folder / "distributed_checkpoint").mkdir()
    pickled(folder / "distributed_checkpoint" / ".metadata", tmp_path)


def asks_for_tuples(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "config.json", return_dict=False)


@pytest.mark.parametrize(
    "change",
    [has_an_adapter_beside, has_pickles_beside, has_a_distributed_checkpoint_beside, asks_for_tuples],
    ids=lambda change: change.__name__,
)
def test_what_lies_beside_is_not_looked_at(folder: Path, tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    before = load(folder).fingerprint
    change(folder, tmp_path)
    loaded = load(folder)
    assert loaded.fingerprint == before
    assert loaded.model.config.return_dict
    assert not (tmp_path / "ran").exists()


def test_the_weights_are_in_memory_of_their_own(folder: Path) -> None:
    loaded = load(folder)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(("key", "size"), [("vocab_size", 10**9), ("vocab_size", 10**12), ("intermediate_size", 10**10)])
def test_a_config_that_promises_what_the_files_do_not_hold_takes_no_memory(folder: Path, key: str, size: int) -> None:
    edit_json(folder / "config.json", **{key: size})
    with pytest.raises(ModelError, match="the weights hold"):
        load(folder)


@pytest.mark.parametrize("shape", [[10**12, 0], [0, 10**15], [2**70, 0], [True, 3], [3.0], "xx", None])
def test_a_header_that_promises_what_the_file_does_not_hold_takes_no_memory(folder: Path, shape: object) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["more"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(ModelError, match="damaged"):
        load(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": 1.5},
        {"eos_token_id": {}},
        {"eos_token_id": 10**30},
        {"eos_token_id": [0, "x"]},
        {"pad_token_id": True},
        {"bad_words_ids": [[99999]]},
        {"forced_eos_token_id": 99999},
        {"suppress_tokens": [-1]},
        {"stop_strings": [3]},
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_generate_is_refused(folder: Path, entry: dict[str, object]) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 0} | entry))
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(caught.value).isprintable()
    assert "generation_config.json" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_fingerprint_sees_every_value(folder: Path, tmp_path: Path, name: str) -> None:
    """Each of 40 places of a matrix, and a whole silenced channel, gives another fingerprint; loaded, streamed and discovered alike."""
    tensors = load_file(folder / "model.safetensors")
    dense = load(folder).model
    seen = {load(folder).fingerprint}
    places = torch.linspace(0, tensors[name].numel() - 1, min(40, tensors[name].numel())).long().tolist()
    for place in places:
        model = copy.deepcopy(dense)
        model.get_parameter(name).data.reshape(-1)[place] += 0.25
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(places)
    silenced = {key: value.clone() for key, value in tensors.items()}
    silenced[name][..., 3] = 0
    save_file(silenced, folder / "model.safetensors", {"format": "pt"})
    loaded = load(folder)
    assert loaded.fingerprint not in seen
    assert open_skeleton(folder).loaded.fingerprint == loaded.fingerprint
    assert discover(ModelView(loaded.model)).fingerprint == loaded.fingerprint
