"""Bad input at the command line: one line with the value, the limit and the remedy, exit code 2, nothing written, no traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import fresh
from folders import edit_json, tiny_tokenizer
from regraft.cli.app import run

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    """A tiny model with a tokenizer, as transformers saves them, and a calibration text beside it."""
    path = tmp_path / "model"
    make_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickle_only(folder: Path) -> None:
    weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04no")


def truncated(folder: Path) -> None:
    raw = weights(folder).read_bytes()
    weights(folder).write_bytes(raw[: len(raw) // 2])


def flipped_header(folder: Path) -> None:
    raw = bytearray(weights(folder).read_bytes())
    raw[60] ^= 0x10
    weights(folder).write_bytes(bytes(raw))


def unknown_family(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="mamba3x", architectures=["Mamba3xForCausalLM"])


def nan_weights(folder: Path) -> None:
    tensors = load_file(weights(folder))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def large_vocabulary(folder: Path) -> None:
    tiny_tokenizer(120).save_pretrained(folder)


MODELS = {
    no_config: r"config\.json",
    pickle_only: r"safetensors",
    truncated: r"model\.safetensors",
    flipped_header: r"model\.safetensors|config",
    unknown_family: r"mamba3x.*(llama|known)",
    nan_weights: r"(?i)nan.*model\.layers\.1\.mlp\.up_proj|model\.layers\.1\.mlp\.up_proj.*(?i:nan)",
    large_vocabulary: r"119.*97 rows",
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs a command that must be refused; returns what it said on the standard error."""
    code = run(arguments)
    said = capsys.readouterr()
    assert code == 2, said
    assert "Traceback" not in said.err
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) == 1, said.err
    return lines[0]


@pytest.mark.parametrize("spoil", MODELS, ids=lambda spoil: spoil.__name__)
def test_bad_models(folder, tmp_path, capsys, spoil):
    spoil(folder)
    said = refused(capsys, ["prune", str(folder), "--criterion", "l2", "--output", str(tmp_path / "out")])
    assert re.search(MODELS[spoil], said), said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*regraft"))


OPTIONS = {
    "ratio-0": (["--ratio", "0"], r"ratio.*0"),
    "ratio-1": (["--ratio", "1"], r"ratio.*1"),
    "ratio-negative": (["--ratio", "-1"], r"ratio.*-1"),
    "ratio-nan": (["--ratio", "nan"], r"ratio.*nan"),
    "ratio-empties-a-layer": (["--ratio", "0.9"], r"0\.9.*at most 0\.\d+.*lower --ratio"),
    "criterion": (["--criterion", "tailor"], r"tailor.*did you mean 'taylor'"),
    "criterion-of-layers": (["--criterion", "removal", "--seq-len", "16"], r"'removal' does not score heads.*use one of .*surgeon"),
    "no-targets": (["--targets", ""], r"--targets names nothing to prune.*heads, ffn"),
    "windows-of-a-token": (["--criterion", "taylor", "--seq-len", "1"], r"windows of 1 token.*at least 2"),
    "layers": (["--layers", "7:9"], r"7:9.*3"),
    "layers-words": (["--layers", "some"], r"some.*1:-1"),
    "shape-and-layers": (["--shape", "uniform", "--layers", "1:"], r"uniform.*--layers"),
    "align": (["--align", "0"], r"align.*0"),
    "seq-len": (["--seq-len", "65", "--criterion", "taylor"], r"65.*64"),
    "missing-text": (["--criterion", "taylor", "--calibration", "nowhere.txt"], r"nowhere\.txt"),
    "unknown-option": (["--rato", "0.2"], r"--rato"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(folder, tmp_path, capsys, name):
    options, expected = OPTIONS[name]
    text = [] if "--calibration" in options else ["--calibration", str(tmp_path / "text.txt")]
    base = [] if "--criterion" in options else ["--criterion", "l2"]
    said = refused(capsys, ["prune", str(folder), "--output", str(tmp_path / "out"), *text, *base, *options])
    assert re.search(expected, said), said
    assert not (tmp_path / "out").exists()


TEXTS = {"empty": b"", "binary": b"\x00\x01\xff" * 50, "short": b"Too short."}


@pytest.mark.parametrize("name", TEXTS)
def test_bad_calibration_text(folder, tmp_path, capsys, name):
    path = tmp_path / f"{name}.txt"
    path.write_bytes(TEXTS[name])
    options = ["--criterion", "taylor", "--seq-len", "32", "--calibration", str(path), "--output", str(tmp_path / "out")]
    assert name in refused(capsys, ["prune", str(folder), *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_an_output_that_exists_is_left_alone(folder, tmp_path, capsys, command):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    text = ["--criterion", "l2"] if command == "prune" else ["--data", str(tmp_path / "text.txt"), "--seq-len", "16"]
    assert "exists" in refused(capsys, [command, str(folder), "--output", str(tmp_path / "out"), *text])
    assert (tmp_path / "out" / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_full_disk_leaves_the_old_state(folder, tmp_path):
    """The limit on the size of a file stands for a full disk: the kernel refuses the write in the same place."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from regraft.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    arguments = ["prune", str(folder), "--criterion", "l2", "--output", str(tmp_path / "out")]
    done = fresh.run(["-c", code, *arguments])
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*regraft"))


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert run(["prune", str(folder), "--criterion", "l2", "--ratio", "0.2", "--dry-run"]) == 0
    assert "removed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_good_input_is_taken(folder, tmp_path, capsys):
    """The control: what the tests above spoil works when it is not spoilt."""
    out = tmp_path / "out"
    assert run(["prune", str(folder), "--calibration", str(tmp_path / "text.txt"), "--seq-len", "32", "--output", str(out)]) == 0
    record = json.loads((out / "regraft.json").read_text(encoding="utf-8"))
    plan = record["plan"]
    assert 1 - plan["parameters_after"] / plan["parameters_before"] == pytest.approx(0.2, abs=0.01)
    capsys.readouterr()
    assert run(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == plan["parameters_after"]
