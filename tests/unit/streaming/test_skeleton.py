"""A model without weights against the model that transformers loads."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import edit_json
from regraft.cli.app import run
from regraft.errors import InputError, ModelError
from regraft.groups.declared import discover
from regraft.models.load import load
from regraft.models.view import ModelView
from regraft.settings import LoadSettings
from regraft.streaming.skeleton import open_skeleton

NAME = "model.layers.1.mlp.up_proj.weight"


def change(folder, name, make):
    """Changes one tensor, or removes it, in whichever file holds it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            made = make(tensors.pop(name))
            save_file(tensors if made is None else tensors | {name: made}, path, metadata={"format": "pt"})


def test_groups_and_fingerprint_are_those_of_the_model_in_memory(make_folder, family):
    folder = make_folder(family)
    loaded = load(folder)
    skeleton = open_skeleton(folder)
    assert skeleton.loaded.fingerprint == loaded.fingerprint
    assert skeleton.groups() == discover(ModelView(loaded.model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("stored", "asked"), [(torch.bfloat16, "auto"), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_the_fingerprint_is_of_the_dtype_that_is_loaded(make_folder, tied, stored, asked):
    folder = make_folder("llama", stored, tie_word_embeddings=tied)
    settings = LoadSettings(dtype=asked)
    assert open_skeleton(folder, settings).loaded.fingerprint == load(folder, settings).fingerprint


def test_a_layer_has_its_weights_inside_the_block_alone(make_folder):
    folder = make_folder("qwen3", torch.bfloat16)
    model = load(folder).model
    skeleton = open_skeleton(folder)
    module = skeleton.view.layers[1]
    identities = [id(parameter) for parameter in module.parameters()]
    with skeleton.layer(1) as layer:
        assert layer is module
        for (name, got), want in zip(layer.named_parameters(), model.model.layers[1].parameters(), strict=True):
            assert got.dtype == torch.float32, name
            assert torch.equal(got, want.float()), name
        assert all(parameter.isnan().all() for parameter in skeleton.view.layers[0].parameters())
    assert [id(parameter) for parameter in module.parameters()] == identities
    for parameter in module.parameters():
        assert parameter.isnan().all()
        assert parameter.untyped_storage().nbytes() == 4


def test_buffers_are_those_of_the_model_in_memory(make_folder):
    folder = make_folder("llama")
    buffers = dict(load(folder).model.named_buffers())
    found = dict(open_skeleton(folder).view.model.named_buffers())
    assert found.keys() == buffers.keys()
    assert all(torch.equal(found[name], buffer) for name, buffer in buffers.items())


def test_tied_matrices_that_differ_in_the_file_are_two(make_folder):
    folder = make_folder("llama", tie_word_embeddings=False)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    loaded, skeleton = load(folder), open_skeleton(folder)
    assert skeleton.head_name == "lm_head.weight"
    assert not skeleton.view.model.config.tie_word_embeddings
    assert skeleton.loaded.fingerprint == loaded.fingerprint


def test_tied_matrices_that_are_stored_twice_are_one(make_folder):
    folder = make_folder("llama", tie_word_embeddings=True, shard_size="10MB")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"})
    skeleton = open_skeleton(folder)
    assert skeleton.head_name == skeleton.embedding_name
    assert skeleton.loaded.fingerprint == load(folder).fingerprint


def test_the_checkpoint_of_a_base_model_lacks_a_prefix(make_folder):
    folder = make_folder("llama", tie_word_embeddings=True, shard_size="10MB")
    path = folder / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert open_skeleton(folder).loaded.fingerprint == load(folder).fingerprint


def lacks_a_shard(folder):
    next(folder.glob("model-00002*")).unlink()


def is_truncated(folder):
    path = next(folder.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-100])


def names_a_missing_tensor(folder):
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00008.safetensors"
    entries["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(entries["weight_map"].values()))
    index.write_text(json.dumps(entries))


def lacks_a_tensor(folder):
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    del entries["weight_map"][NAME]
    index.write_text(json.dumps(entries))
    change(folder, NAME, lambda tensor: None)


def has_another_width(folder):
    change(folder, NAME, lambda tensor: tensor[:-1].contiguous())


def has_more_layers_than_its_config(folder):
    edit_json(folder / "config.json", num_hidden_layers=2)


def has_fewer_layers_than_its_config(folder):
    edit_json(folder / "config.json", num_hidden_layers=4)


def is_wider_than_its_config(folder):
    edit_json(folder / "config.json", intermediate_size=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lacks_a_shard, r"lacks 1 of \d+ weight files"),
        (is_truncated, "is truncated"),
        (names_a_missing_tensor, "says that .* holds 'model.layers.9.mlp.up_proj.weight', but it does not"),
        (lacks_a_tensor, f"the weights lack '{NAME}'"),
        (has_another_width, rf"'{NAME}' is \[63, 48\] in the weights, but config.json asks for \[64, 48\]"),
        (has_more_layers_than_its_config, "config.json says 2 layers, the weights hold 3"),
        (has_fewer_layers_than_its_config, "config.json says 4 layers, the weights hold 3"),
        (is_wider_than_its_config, r"is \[48, 64\] in the weights, but config.json asks for \[48, 60\]"),
    ],
)
def test_what_is_not_one_whole_model_is_refused(make_folder, tmp_path, capsys, spoil, words):
    """In one line, streamed and in memory."""
    folder = make_folder("llama")
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        open_skeleton(folder)
    for bound in (["--memory", "2GB"], []):
        capsys.readouterr()
        assert run(["prune", str(folder), "--output", str(tmp_path / "out"), "--criterion", "l1", *bound]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert re.search(words, lines[0])
    assert not list(tmp_path.glob("*out*"))


def test_values_that_no_training_gives_are_refused_when_they_are_read(make_folder):
    folder = make_folder("llama")

    def spoiled(tensor):
        tensor[3, 4] = torch.nan
        return tensor

    change(folder, NAME, spoiled)
    skeleton = open_skeleton(folder)
    with pytest.raises(ModelError, match=f"'{NAME}' holds NaN or infinity in 1 of 3072 values"), skeleton.layer(1):
        pass
    with pytest.raises(ModelError, match="holds NaN"):
        list(skeleton.pieces(NAME))


def test_a_device_that_is_not_here_is_refused(make_folder):
    with pytest.raises(InputError, match="device 'cuda:9' is not here"):
        open_skeleton(make_folder("llama"), LoadSettings(device="cuda:9"))
