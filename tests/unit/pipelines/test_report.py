"""Pages of folders, and the list of runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import regraft
from folders import tiny_tokenizer
from regraft.cli import app
from regraft.errors import InputError
from regraft.models.provenance import provenance_text
from regraft.pipelines.report import list_runs, past_of, report_of, write_page
from regraft.plans import LossReport, Measurement, Provenance, SizeReport, to_json
from regraft.report.summary import RunReport


def run_at(folder: Path, loss: float, parameters: int, text: str = "t") -> Path:
    """A finished run, as far as its record goes."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    measured = tuple(
        Measurement(label, LossReport(value, 9.0, 1.0, 8, 4, 10, 40, 1, True, text, "all"), SizeReport(size, size, size, size, 8))
        for label, value, size in (("dense", 2.0, 100), ("pruned", loss, parameters))
    )
    (folder / "report.json").write_text(to_json(RunReport(folder.name, "", "model: x\n", measured)))
    return folder


def test_runs_are_listed_compared_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, _ = run_at(tmp_path / "one", 2.5, 80), run_at(tmp_path / "two", 2.2, 90)
    run_at(tmp_path / "elsewhere", 1.0, 10, text="another text")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "regraft.json").write_text(provenance_text(Provenance("regraft prune x", "x", "", 0, {})))
    (tmp_path / "plan.search").mkdir()  # of `allocate`, not finished
    (tmp_path / "plan.search" / "run.json").write_text('{"allocate": {}, "recover": {}}')
    assert [run.name for run in list_runs(tmp_path)] == ["begun", "elsewhere", "one", "two"]
    with pytest.raises(InputError, match=r"the search '.*plan.search' is not finished; go on with it by `regraft allocate`"):
        report_of(tmp_path / "plan.search")
    assert app.run(["runs", str(tmp_path), "--compare", "one,two", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [(line["run"], line["model"], round(line["change_nats"], 6)) for line in lines] == [
        ("one", "dense", 0), ("one", "pruned", 0.5), ("two", "dense", 0), ("two", "pruned", 0.2),
    ]  # fmt: skip
    past = past_of(one)  # only what was measured on the same text
    assert {(entry.run, entry.label, entry.current) for entry in past} == {
        ("one", "dense", False), ("one", "pruned", True), ("two", "dense", False), ("two", "pruned", False),
    }  # fmt: skip
    page = write_page(one).read_text(encoding="utf-8")
    assert "Size against loss, over all runs" in page
    assert app.run(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "elsewhere" in said.out
    noted = [line.rpartition("/")[2] for line in said.err.splitlines() if "has no page; write it by: regraft report" in line]
    assert noted == ["elsewhere", "killed", "two"]  # "one" has its page, the others are not finished
    assert app.run(["runs", str(tmp_path), "--json"]) == 0
    assert [line["model"] for line in json.loads(capsys.readouterr().out)] == ["not finished", "pruned", "pruned", "pruned"]
    assert app.run(["runs", str(tmp_path), "--remove", "twoo", "--yes"]) == 2
    assert "did you mean 'two'?" in capsys.readouterr().err
    assert app.run(["runs", str(tmp_path), "--remove", "two", "--yes"]) == 0
    assert not (tmp_path / "two").exists()


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    for folder, message in ((tmp_path, "is no run"), (tmp_path / "none", "does not exist"), (tmp_path / "begun", "is not finished")):
        assert app.run(["report", str(folder)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    with pytest.raises(InputError, match="is no folder"):
        list_runs(tmp_path / "none")


@pytest.mark.slow
def test_a_pruned_model_alone_has_a_page(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    made = regraft.prune(make_model("llama"), tokenizer=tiny_tokenizer(), ratio=0.2, criterion="l2", align=1)
    made.save_pretrained(tmp_path / "pruned")
    report = report_of(tmp_path / "pruned")
    assert report.plan == made.plan
    groups = {group.name: group.units for group in made.groups.groups}
    kept = {cut.group: len(cut.kept) for cut in made.plan.cuts}
    assert {width.group: (width.before, width.after) for width in report.widths} == {
        name: (units, kept.get(name, units)) for name, units in groups.items() if name in made.plan.removed
    }
    page = write_page(tmp_path / "pruned", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "of the parameters are gone" in page
    assert "The layers" in page
    assert not (tmp_path / "pruned" / "report.html").exists()
    regraft.load(tmp_path / "pruned")  # the folder is as it was
