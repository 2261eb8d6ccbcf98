"""Figures as JSON: in a file that is claimed, or alone on the standard output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regraft.cli import app
from regraft.cli.figures import STDOUT, Figures
from regraft.errors import OutputError

LIGHT = ("prune.criterion=l2", "prune.select=uniform", "prune.reconstruct=none")


def test_a_file_of_other_figures_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    for _ in range(2):  # a file of ours is replaced
        with Figures(path).reserved("ratio"):
            Figures(path).write('{"ratio": 0.2}')
    assert json.loads(path.read_text(encoding="utf-8")) == {"ratio": 0.2}
    with pytest.raises(OutputError, match="exists"), Figures(path).reserved("verdict"):
        pass
    for place, shown in ((STDOUT, "{}\n"), (None, "")):
        with Figures(place).reserved("ratio"):
            Figures(place).write("{}")
        assert capsys.readouterr().out == shown
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_the_figures_of_a_run_are_alone_on_the_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["run", "quickstart", *LIGHT, "--dry-run", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["parameters_after"] == found["sizes"]["pruned"]["parameters"] < found["sizes"]["dense"]["parameters"]
    assert {row["kind"] for row in found["plan"]["groups"]} == {"heads", "ffn"}
    assert (found["folder"], found["measurements"], list(tmp_path.iterdir())) == (None, [], [])
