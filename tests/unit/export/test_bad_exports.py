"""What goes wrong in an export is said in one line with a remedy, and nothing half-written stays."""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from gguf_toys import as_loaded, byte_level_tokenizer, toy
from regraft.cli.app import run
from regraft.errors import InputError, MissingDependencyError, OutputError
from regraft.export import EXPORTERS
from regraft.export.gguf.catalogue import ARCHITECTURES
from regraft.export.gguf.vocabulary import vocabulary_of
from regraft.pipelines.export import export
from regraft.settings import ExportSettings

pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy("llama").save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("library", ["gguf", "xllamacpp"])
def test_a_missing_library_is_named_with_the_command_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(import_module("regraft.export.llama_cpp"), "find_spec", lambda name: None if name == library else object())
    with pytest.raises(MissingDependencyError, match=r"pip install 'regraft\[gguf\]'"):
        export(as_loaded(toy("llama")), tmp_path / "out", "gguf", check="the king and the thing in the morning")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(import_module("regraft.export.gguf.write"), "encode", full)
    with pytest.raises(OutputError, match="disk is full"):
        export(as_loaded(toy("llama")), tmp_path / "out", "gguf", check=None)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("regraft.export.gguf.write"), "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(as_loaded(toy("llama")), tmp_path / "out", "gguf", check=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "safetensor"], "known: gguf, hf, hf-uniform, nemotron-nas, ollama, peft-lora"),
        (["--to", "hf", "--quantize", "Q8_0"], "--to gguf"),
        (["--to", "gguf", "--quantize", "Q9"], "Q8_0"),
        (["--to", "gguf", "--architecture", "qwen3"], "does not compute family 'llama'"),
        (["--to", "gguf", "--check", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--to", "gguf", "--check", "a"], "give a longer one"),
        (["--to", "gguf", "--check", "."], "'.' is a folder"),
        (["--to", "gguf", "--check", "a b", "--no-check"], "--check gives the text of a comparison that --no-check leaves out"),
        (["--to", "gguf", "--importance", "nowhere.txt"], "F32 has none; add --quantize Q4_K_M"),
        (["--to", "ollama", "--shard-size", "1GB"], "GGUF is one file"),
        (["--to", "peft-lora", "--quantize", "Q8_0"], "--quantize is for formats of whole models, not for 'peft-lora'"),
        (["--to", "merged", "--check", "a b c"], "hf, hf-uniform"),
        (["--to", "peft-lora"], "or export a model with --to hf or --to gguf"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(["export", str(folder), "--output", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gone/away/for/good"}')
    assert run(["export", str(tmp_path / "adapter"), "--to", "gguf", "--output", str(tmp_path / "out")]) == 2
    assert "adapter" in capsys.readouterr().err


def test_tokenizers_that_gguf_cannot_hold_are_refused() -> None:
    character = byte_level_tokenizer()
    character.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for tokenizer, words in ((None, "no tokenizer"), (character, "neither byte-level")):
        with pytest.raises(InputError, match=words):
            vocabulary_of(tokenizer, 320)


def test_every_format_declares_what_it_holds() -> None:
    for name in EXPORTERS:
        form = EXPORTERS.get(name)
        assert form.summary
        assert all(row.proof.startswith(("run", "rules")) for row in form.holds)
    assert [row.uneven for row in EXPORTERS.get("gguf").holds] == [entry.uneven for entry in ARCHITECTURES]


@pytest.mark.slow
def test_settings_are_read_from_the_command_line(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(folder), "--to", "gguf", "--quantize", "q8_0", "--no-check", "--output", str(tmp_path / "out")]
    assert run(command) == 0, capsys.readouterr().err
    assert "Q8_0" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.gguf").is_file()
    assert ExportSettings().check_positions == 64
