"""Reading and writing piece by piece, against the safetensors library."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regraft.atomic import sha256_of
from regraft.errors import ModelError
from regraft.models.view import digest_of
from regraft.streaming import checkpoint
from regraft.streaming.checkpoint import CheckpointFiles
from regraft.streaming.writer import Shard, ShardWriter


def test_every_way_of_reading_gives_what_was_saved(make_folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)
    folder = make_folder("llama-bias", torch.bfloat16)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2, "the test wants several shards"
    whole = {name: tensor for file in files for name, tensor in load_file(file).items()}
    source = CheckpointFiles(folder)
    assert sorted(source.places) == sorted(whole)
    for name, tensor in whole.items():
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(torch.cat(list(source.pieces(name))), tensor)
        assert source.digest(name, tensor.dtype) == digest_of(tensor)
        assert source.digest(name, torch.bfloat16) == digest_of(tensor.to(torch.bfloat16))
        assert source.read(name).dtype == torch.bfloat16
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.rows(up, 5, 9), whole[up][5:9])
    assert torch.equal(source.gather(up, torch.tensor([3, 3, 60])), whole[up][[3, 3, 60]])
    assert len(list(source.pieces(up))) > 3
    assert source.bytes_read > 3 * sum(tensor.nbytes for tensor in whole.values())


def test_a_digest_is_read_anew_when_the_file_has_changed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5.0), "scalar": torch.tensor(2.5)}, path)
    source = CheckpointFiles(tmp_path)
    before = source.bytes_read
    first = source.digest("scalar", torch.float32)
    assert first == digest_of(torch.tensor(2.5))
    once = source.bytes_read
    assert once == before + 4
    assert source.digest("scalar", torch.float32) == first
    assert source.bytes_read == once
    save_file({"a": torch.arange(5.0), "scalar": torch.tensor(3.5)}, path)
    os.utime(path, ns=(1, 1))
    assert CheckpointFiles(tmp_path).digest("scalar", torch.float32) == digest_of(torch.tensor(3.5))


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.zeros(100)}, path)
    source = CheckpointFiles(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    assert source.read("a").shape == (100,)
    with pytest.raises(ModelError, match="ended while it was read, 40 bytes too early"):
        source.read("b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    tensors = {
        name: torch.randn(shape).to(dtype) for name, shape in {"a.weight": (7, 5), "b": (3,), "none": (0, 4), "c": (2, 3, 4)}.items()
    }
    shard = Shard("x.safetensors", {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype)
    with ShardWriter(tmp_path, shard) as writer:
        writer.write("a.weight", [tensors["a.weight"][:4], tensors["a.weight"][4:].float()])
        for name in ("b", "none", "c"):
            writer.write(name, [tensors[name]])
    path = tmp_path / "x.safetensors"
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert writer.sha256 == sha256_of(path)
    assert shard.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_what_is_not_what_was_announced_is_a_defect(tmp_path):
    with pytest.raises(AssertionError, match="has 3 values"), ShardWriter(tmp_path, Shard("x", {"a": (2, 2)}, torch.float32)) as writer:
        writer.write("a", [torch.zeros(3)])
    with pytest.raises(AssertionError, match="was not written"), ShardWriter(tmp_path, Shard("x", {"a": (2, 2)}, torch.float32)):
        pass
