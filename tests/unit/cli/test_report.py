"""The page that commands write into the folder of their result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regraft.cli import app, report
from regraft.pipelines.report import page_of
from tiny_inputs import make_inputs

TRAIN = ["--data", "text.txt", "--seq-len", "16", "--batch", "2", "--held-out", "0.2", "--device", "cpu"]
RECOVER = ["recover", "pruned", *TRAIN, "--steps", "2", "--eval-every", "1", "--rank", "2", "--quiet"]
ALLOCATE = [
    "allocate",
    "pruned",
    *TRAIN,
    "--method",
    "proportional",
    "--ranks",
    "1,2,3",
    "--budget",
    "r=2",
    "--samples",
    "2",
    "--steps",
    "2",
    "--quiet",
]
COMPRESS = ["compress", "model", "--calibration", "text.txt", "--samples", "2", "--seq-len", "16", "--device", "cpu", "--quiet"]
PRUNE = ["prune", "model", "--criterion", "l2", "--align", "1", "--device", "cpu", "--quiet"]


@pytest.mark.long
def test_each_command_writes_its_page_and_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_inputs()
    # The page is what `regraft report` makes of the folder, and the JSON file names it.
    monkeypatch.setenv("REGRAFT_REPORT", "1")
    assert app.run([*PRUNE, "-o", "pruned", "--json", "figures.json"]) == 0
    assert "saved to pruned; its page: pruned/report.html" in capsys.readouterr().out
    assert json.loads(Path("figures.json").read_text())["page"] == "pruned/report.html"
    first = Path("pruned/report.html").read_bytes()
    assert first.decode() == page_of(Path("pruned"))
    assert b"of the parameters are gone" in first
    monkeypatch.setenv("REGRAFT_REPORT", "0")
    # A recovery that was finished before gets the page that it lacks, with the loss curve; then it is the same to the byte.
    capsys.readouterr()
    assert app.run([*RECOVER, "-o", "out"]) == 0
    assert "a page of it: regraft report out --open" in capsys.readouterr().out
    assert not Path("out/report.html").exists()
    pages: list[str] = []
    for _ in range(2):
        assert app.run([*RECOVER, "-o", "out", "--resume", "--report"]) == 0
        pages.append(Path("out/report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert "The held-out loss went from" in pages[0]
    assert "Loss while recovering" in pages[0]
    capsys.readouterr()
    assert app.run([*ALLOCATE, "-o", "plan.json", "--report"]) == 0
    assert "its page: plan.search/report.html" in capsys.readouterr().out
    # A dry run writes nothing.
    assert app.run([*COMPRESS, "--report", "--dry-run"]) == 0
    assert app.run([*COMPRESS, "-o", "small", "--report"]) == 0
    assert "layers are factored" in Path("small/report.html").read_text(encoding="utf-8")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("ours\nand theirs")])
def test_a_page_that_cannot_be_written_is_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(folder: Path) -> Path:
        raise error

    monkeypatch.setattr(report, "write_page", fails)
    assert report.page_beside(tmp_path, wanted=True) is None
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("warning: there is no page of the result: ")
    assert said.err.count("\n") == 1
    assert report.page_beside(tmp_path, wanted=False) is None
    assert report.page_beside(None, wanted=True) is None
    assert capsys.readouterr().err == ""


def test_the_switch_in_the_environment_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("REGRAFT_REPORT", "perhaps")
    assert app.run(["prune", "seedling", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "REGRAFT_REPORT" in said
    assert said.count("\n") == 1
