"""A streamed run that was interrupted goes on from its last finished shard, and ends with the same bytes."""

from __future__ import annotations

import json
import shutil

import pytest

from regraft.claims import claimed
from regraft.errors import OutputError
from regraft.models.load import load
from regraft.pipelines.prune import planning
from regraft.pipelines.prune.prune import prune
from regraft.streaming import output as streaming_output
from slicing import files_of

PLENTY = "2GB"


class Killed(BaseException):
    """Stands for a signal: nothing but clean-up runs after it."""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(streaming_output, "SHARD_BYTES", 40_000)


def killed_while(words):
    def say(line):
        if words in line:
            raise Killed

    return say


def no_scoring(monkeypatch):
    def score(*arguments):
        raise AssertionError("an interrupted run has scored already")

    monkeypatch.setattr(planning, "score", score)


DEPTH = {"targets": ("layers", "attention", "mlp", "ffn"), "ratio": 0.6, "align": 1, "num_hidden_layers": 6}


@pytest.mark.slow
@pytest.mark.parametrize("memory", [PLENTY, "5MB"])
@pytest.mark.parametrize("shard", [1, 2, 4])
@pytest.mark.parametrize("reconstruct", ["least_squares", "none"])
def test_it_ends_with_the_same_bytes(make_folder, settings, tmp_path, monkeypatch, memory, shard, reconstruct):
    ends_with_the_same_bytes(make_folder, settings, tmp_path, monkeypatch, shard, memory=memory, reconstruct=reconstruct)


@pytest.mark.long
@pytest.mark.parametrize("shard", [2, 3, 4])
def test_where_layers_and_parts_are_gone_too(make_folder, settings, tmp_path, monkeypatch, shard):
    plan = ends_with_the_same_bytes(make_folder, settings, tmp_path, monkeypatch, shard, memory=PLENTY, **DEPTH)
    assert {entry.group.rpartition(".")[2] for entry in plan.cuts} == {"layer", "attention", "mlp", "ffn"}


def ends_with_the_same_bytes(make_folder, settings, tmp_path, monkeypatch, shard, num_hidden_layers=3, **given):
    folder = make_folder("llama-bias", num_hidden_layers=num_hidden_layers)
    asked = settings(criterion="taylor", **given)
    done = prune(folder, tmp_path / "through", asked, command="same")
    count = len(list((tmp_path / "through").glob("*.safetensors")))
    assert count >= 4
    with pytest.raises(Killed):
        prune(folder, tmp_path / "out", asked, command="same", say=killed_while(f"writing shards: {shard} of {count}"))
    partial = tmp_path / ".out.regraft" / "new"
    assert not (tmp_path / "out").exists()
    assert len(json.loads((partial / "progress.json").read_text())["shards"]) == shard - 1
    (partial / "hidden.bin").write_bytes(b"left by a kill")
    no_scoring(monkeypatch)
    lines: list[str] = []
    prune(folder, tmp_path / "out", asked, command="same", say=lines.append)
    assert not partial.parent.exists()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "through")
    assert not any(f"writing shards: {number} of" in line for line in lines for number in range(1, shard))
    return done.plan


@pytest.mark.slow
def test_a_shard_that_was_damaged_meanwhile_is_made_again(make_folder, settings, tmp_path):
    folder = make_folder("llama")
    asked = settings(memory=PLENTY)
    prune(folder, tmp_path / "through", asked, command="same")
    with pytest.raises(Killed):
        prune(folder, tmp_path / "out", asked, command="same", say=killed_while("writing shards: 4"))
    damaged = next((tmp_path / ".out.regraft" / "new").glob("model-00002*"))
    raw = bytearray(damaged.read_bytes())
    raw[-3] ^= 1
    damaged.write_bytes(bytes(raw))
    prune(folder, tmp_path / "out", asked, command="same")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "through")


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"ratio": 0.3}, {"reconstruct": "none"}, {"samples": 9}])
def test_a_run_that_is_asked_for_something_else_starts_anew(make_folder, settings, tmp_path, change):
    folder = make_folder("llama")
    with pytest.raises(Killed):
        prune(folder, tmp_path / "out", settings(memory=PLENTY), command="same", say=killed_while("writing shards: 3"))
    prune(folder, tmp_path / "through", settings(memory=PLENTY, **change), command="same")
    prune(folder, tmp_path / "out", settings(memory=PLENTY, **change), command="same")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "through")


@pytest.mark.slow
def test_another_model_starts_anew(make_folder, settings, tmp_path):
    folder, other = make_folder("llama"), make_folder("llama", tie_word_embeddings=True)
    with pytest.raises(Killed):
        prune(folder, tmp_path / "out", settings(memory=PLENTY), command="same", say=killed_while("writing shards: 3"))
    prune(other, tmp_path / "out", settings(memory=PLENTY), command="same")
    load(tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_stops_before_it_has_decided_leaves_nothing(make_folder, settings, tmp_path):
    folder = make_folder("llama")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Killed):
        prune(folder, tmp_path / "out", settings(memory="5MB"), say=killed_while("going back through layers: 2 of"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_note_that_is_not_ours_is_not_believed(make_folder, settings, tmp_path):
    folder = make_folder("llama")
    prune(folder, tmp_path / "through", settings(memory=PLENTY), command="same")
    partial = tmp_path / ".out.regraft" / "new"
    for text in ("", "{}", "[1]", '{"asked": 1, "plan": {}, "shards": {}}'):
        with claimed(tmp_path / "out"):
            partial.mkdir()
        (partial / "progress.json").write_text(text)
        (partial / "rubbish").write_text("left by somebody")
        prune(folder, tmp_path / "out", settings(memory=PLENTY), command="same")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "through")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished_and_says_so(make_folder, settings, tmp_path, monkeypatch):
    folder = make_folder("llama")
    asked = settings(memory=PLENTY)
    prune(folder, tmp_path / "through", asked, command="same")
    write = streaming_output.ShardWriter.write

    def full(self, name, pieces):
        if name.startswith("model.layers.2."):
            raise OSError(28, "No space left on device", str(tmp_path))
        write(self, name, pieces)

    monkeypatch.setattr(streaming_output.ShardWriter, "write", full)
    with pytest.raises(OutputError, match=r"disk is full.*what is finished stays in '.*\.out\.regraft', and the same command goes on"):
        prune(folder, tmp_path / "out", asked, command="same")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(streaming_output.ShardWriter, "write", write)
    prune(folder, tmp_path / "out", asked, command="same")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "through")
