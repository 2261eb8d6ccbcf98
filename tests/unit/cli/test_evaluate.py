from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest
from rich.console import Console

from regraft.cli import app
from regraft.cli import evaluate as command
from regraft.plans import LossReport, Measurement, SizeReport, SpeedReport

LOSS = LossReport(1.5, 4.48, 0.9, 64, 32, 1234, 5678, 3, True, "some.txt", "all")
SIZE = SizeReport(1_000_000, 2_000_000, 4_000_000, 950_000, 64)
SPEED = SpeedReport(0.0123, 0.0045, 300_000_000, 48, 16, 5, 1, "cpu")
REQUIRED = {"loss_nats", "perplexity", "bits_per_byte", "window_tokens", "stride_tokens", "tokens", "parameters", "text"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Puts a stand-in in the place of the measurement, and gives what it was called with."""
    found: list[tuple[object, ...]] = []

    def stand_in(model: str, settings: object, *, load: object, seed: int, progress: object) -> Measurement:
        found.append((model, settings, load, seed))
        progress(1, 2)
        return Measurement(model, LOSS, SIZE, SPEED if settings.speed else None)

    monkeypatch.setattr(command, "evaluate_model", stand_in)
    return found


def test_options_become_settings(calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    line = "evaluate some/folder --text t.txt --window 64 --stride 16 --max-tokens 9 --bos false --speed --dtype bfloat16 --seed 5"
    assert app.run(shlex.split(line)) == 0
    ((model, settings, load, seed),) = calls
    assert (model, load.dtype, load.device, seed) == ("some/folder", "bfloat16", "auto", 5)
    assert settings.model_dump() == {
        "text": Path("t.txt"), "window": 64, "stride": 16, "max_tokens": 9, "bos": False, "speed": True
    }  # fmt: skip
    shown = capsys.readouterr().out
    for figure in ("1.5000 nats", "4.480", "64 / 32 tokens", "1,234", "1,000,000", "12.3 ms", "4.50 ms/token", "some.txt"):
        assert figure in shown


def test_progress_off_a_terminal_is_a_line_every_half_minute_and_none_when_quiet(
    calls: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.cli.progress.EVERY_SECONDS", 0.01)
    stand_in = command.evaluate_model
    monkeypatch.setattr(command, "evaluate_model", lambda *given, **more: (stand_in(*given, **more), time.sleep(0.3))[0])
    assert app.run(["evaluate", "some/folder"]) == 0
    assert "measuring: 1 of 2 (0 s so far" in capsys.readouterr().err
    assert app.run(["evaluate", "some/folder", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_json_is_flat_and_replaces_what_was_there(calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "figures.json"
    assert app.run(["evaluate", "seedling", "--json", str(file)]) == 0
    values = json.loads(file.read_text())
    assert values.keys() >= REQUIRED
    assert (values["loss_nats"], values["parameters"], values["text"]) == (1.5, 1_000_000, "some.txt")
    assert "prefill_seconds" not in values
    assert app.run(["evaluate", "seedling", "--speed", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["prefill_seconds"] == 0.0123
    assert [entry.name for entry in file.parent.iterdir()] == ["figures.json"]


def test_json_on_the_screen_is_nothing_but_json(calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["evaluate", "seedling", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 1234


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "0"], "--window"),
        (["--window", "many"], "--window"),
        (["--stride", "-3"], "--stride"),
        (["--bos", "perhaps"], "--bos"),
        (["--windw", "3"], "--windw"),
        ([], "MODEL"),
    ],
)
def test_wrong_options_are_told_in_one_line(calls: list, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert app.run(["evaluate", *(["seedling", *arguments] if arguments else [])]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert calls == []


def test_a_file_that_cannot_be_written_is_refused_before_measuring(calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "not a folder that can be written")):
        assert app.run(["evaluate", "seedling", "--json", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert calls == []


def test_the_table_fits_a_narrow_terminal() -> None:
    console = Console(width=60, record=True)
    label = "a/very/long/path/" * 8
    command.show_figures(console, label, command.rows(Measurement(label, LOSS, SIZE, SPEED)))
    assert all(len(line) <= 60 for line in console.export_text().splitlines())
