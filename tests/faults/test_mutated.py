"""Values of options, tables, records of runs and stores of searches, each changed in every place: one line, and nothing else."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

import regraft.settings
from nasty import NASTY_TEXTS, NASTY_VALUES, leaves, one_line, with_leaf
from regraft.cli.app import load_command, run
from regraft.completion.ratings import read_pairs, read_ratings
from regraft.errors import RegraftError
from regraft.pipelines.report import figures_of, list_runs, page_of, progress_of
from regraft.pipelines.run.folder import MANIFEST, open_run
from regraft.pipelines.run.page import read_curve
from regraft.plans import LossReport, Measurement, PrunePlan, SizeReport, SpeedReport
from regraft.plans.json import to_json
from regraft.report.summary import CurvePoint, RunReport, Width
from regraft.search.pools import Inline
from regraft.search.run import open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import FILE, open_storage
from regraft.settings import Settings, checked
from search_fakes import SCHEDULE, SPACE, PlantedLearner, PlantedMeasure

ODD_NUMBERS = ["nan", "inf", "1e400", "-0", "1e-400", "9" * 400, "٣", "½", "1_000", "0x10", " 1 "]
ODD_TEXTS = [*NASTY_TEXTS, " ", "\t", ",", "1,,2", "=", "a=", "=a", ":", "::", "[]", "null", "\ud800", "..", "x" * 5000]
SECTIONS = [
    kind for kind in vars(regraft.settings).values() if isinstance(kind, type) and issubclass(kind, Settings) and kind is not Settings
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_setting_by_every_word(kind: type[Settings]) -> None:
    values: list[Any] = [*NASTY_VALUES, *ODD_NUMBERS, *ODD_TEXTS, [""], [" ", "a"], [None], ["\ud800"], {"": None}, b"x", object(), -0.0]
    for word in kind.words():
        for value in values:
            one_line(lambda word=word, value=value: checked(kind, {word: value}, "these"), (word, value))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "allocate", "complete", "generate", "runs", "advise"])
def test_every_option_of_its_own(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = {word for kind in SECTIONS for word in kind.words()}
    parameters = load_command(command).params
    own = [one for one in parameters if one.param_type_name == "option" and not one.is_flag and one.name not in {*words, "help"}]
    needed = [part for one in parameters if one.param_type_name == "option" and one.required for part in (one.opts[0], "out")]
    values = [*ODD_NUMBERS[:7], "", "  ", "a\nb", "\x1b[31m", "\ud800", "\0", "/dev/zero", ".."]
    for number, value in enumerate(values):
        option = max(own[number % len(own)].opts, key=len)
        rest = [] if option in needed or own[number % len(own)].opts[0] in needed else needed
        code = run([command, "not-there", *rest, f"{option}={value}"])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line]
        assert code == 2, (option, value, said)
        assert len([line for line in lines if line.startswith("error:")]) == 1, (option, value, said)
        assert all(line.isprintable() and line.startswith(("error:", "  - ", "note:")) for line in lines), (option, value, lines)
        assert not list(tmp_path.iterdir()), (option, value)


def tables(rows: list[list[str]]) -> Iterator[str]:
    """Yields tables with each cell replaced, each column left out, doubled or renamed, and rows that are longer and shorter."""
    for y, row in enumerate(rows):
        for x in range(len(row)):
            for value in [*ODD_NUMBERS, *ODD_TEXTS]:
                yield written([[value if (x, y) == (i, j) else cell for i, cell in enumerate(line)] for j, line in enumerate(rows)])
        for changed in (row[:-1], [*row, "1"], [], ['"'], ["", *row]):
            yield written([changed if y == j else line for j, line in enumerate(rows)])
    for x in range(len(rows[0])):
        yield written([line[:x] + line[x + 1 :] for line in rows])
        yield written([[*line, line[x]] for line in rows])
    yield from ("", "\n", "user,item,rating", "a" * 200_000, ",\n" * 2000, "\0", '"' * 999)


def written(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


CURVE = [["step", "train_loss_nats", "held_out_loss_nats"], ["0", "", "3.5"], ["10", "3.4", "3.3"]]
RATINGS = [["user", "item", "rating"], ["1", "2", "3.5"], ["2", "2", "1"], ["3", "1", "5"]]
TABLES: dict[str, tuple[str, list[list[str]], Callable[[Path], object]]] = {
    "losses": ("training_log.csv", CURVE, lambda path: read_curve(path.parent)),
    "ratings": ("ratings.csv", RATINGS, read_ratings),
    "ratings, the last counts": ("ratings.csv", RATINGS, lambda path: read_ratings(path, "last")),
    "pairs": ("pairs.csv", [row[:2] for row in RATINGS], read_pairs),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_a_table(name: str, tmp_path: Path) -> None:
    file, rows, read = TABLES[name]
    path = tmp_path / file
    path.write_text(written(rows), encoding="utf-8")
    read(path)  # the control: what is whole is read
    for text in tables(rows):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        one_line(lambda: read(path), text[:200])


def a_report() -> dict[str, Any]:
    loss = LossReport(3.0, 20.0, 1.0, 256, 128, 12_345, 54_321, 30, True, "the text", "test")
    measured = Measurement("dense", loss, SizeReport(100, 200, 400, 600, 256), SpeedReport(0.1, 0.01, 1000, 256, 32, 5, 2, "cpu"))
    plan = PrunePlan("f", "taylor", "global", "per-layer", 0.25, 16, 200, 100, ())
    curve = (CurvePoint(0, None, 3.5), CurvePoint(10, 3.4, 3.3))
    made = RunReport("t", "", "model: x\n", (measured,), plan, (Width("layers.0.ffn", 7, 3),), curve=curve, samples={"dense": "z"})
    return json.loads(to_json(made))


@pytest.mark.slow
def test_every_leaf_of_a_report(tmp_path: Path) -> None:
    whole = a_report()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}", encoding="utf-8")

    def read(*, page: bool) -> list[Any]:
        found = list_runs(tmp_path)
        if page:
            page_of(folder)
        return [figures_of(one, every_model=True) for one in found] + [progress_of(one) for one in found]

    count = 0
    for way in [(), *leaves(whole)]:
        for value in (*NASTY_VALUES, 10**400, 1e308, -1e308):
            (folder / "report.json").write_bytes(json.dumps(with_leaf(whole, way, value)).encode("utf-8", "surrogatepass"))
            count += 1
            one_line(lambda page=count % 61 == 0: read(page=page), (way, value))
    for text in (b"[" * 10**5, b'{"title": 1, "title": 2}', b"{" * 500, b'{"title":' * 500, b"\xff", b""):
        (folder / "report.json").write_bytes(text)
        one_line(lambda: read(page=True), text[:50])
    (folder / "report.json").write_text(json.dumps(whole), encoding="utf-8")
    assert read(page=True)[0][0]["loss_nats"] == 3.0
    assert count > 1000


@pytest.mark.slow
def test_every_leaf_of_a_run_s_own_files(tmp_path: Path) -> None:
    """A stage with a changed manifest is made again, or the run says what is wrong; nothing outside of its folder is read for it."""
    path, made = tmp_path / "run", []

    def stage(folder: Path) -> None:
        made.append(folder)
        (folder / "weights").write_bytes(b"abc")

    def go() -> None:
        with open_run(path, {"recipe": {"model": "x"}}, resume=path.exists(), say=lambda line: None) as opened:
            opened.stage("first", {"ratio": 0.2}, stage)
            opened.checksums(path / "first")
            opened.seconds()

    go()
    files = [path / "first" / MANIFEST, path / "timings.json", path / "run.json"]
    whole = {file: file.read_bytes() for file in files}
    for file in files:
        value = json.loads(whole[file])
        for way in [(), *leaves(value)]:
            for nasty in NASTY_VALUES:
                file.write_bytes(json.dumps(with_leaf(value, way, nasty)).encode("utf-8", "surrogatepass"))
                one_line(go, (file.name, way, nasty))
                whole[files[1]] = files[1].read_bytes() if file != files[1] else whole[files[1]]
        file.write_bytes(whole[file])
        for name in ("n" * 300, "a\0b", "../x", "/etc/passwd", "\ud800", ""):
            if file.name == MANIFEST:
                changed = value | {"files": {name: "0"}}
                file.write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
                one_line(go, name)
    before = len(made)
    go()
    assert len(made) in (before, before + 1)
    assert (path / "first" / "weights").read_bytes() == b"abc"


@pytest.mark.long
def test_every_value_in_the_store_of_a_search(tmp_path: Path) -> None:
    """The texts and numbers in the tables that hold rounds and trials, of which all but their kind is ours."""

    def sampler() -> AllocatorSampler:
        return AllocatorSampler(SPACE, cast(Any, PlantedLearner()), SCHEDULE, seed=0)

    def look(folder: Path) -> object:
        opened = open_search(open_storage(None, folder), "one", SPACE, sampler(), "", resume=True)
        with Inline(PlantedMeasure(folder / "log")) as pool:
            return search(opened, sampler(), pool, lambda *what: None)

    opened = open_search(open_storage(None, tmp_path), "one", SPACE, sampler(), "", resume=False)
    with Inline(PlantedMeasure(tmp_path / "log")) as pool:
        search(opened, sampler(), pool, lambda *what: None)
    whole = (tmp_path / FILE).read_bytes()
    with closing(sqlite3.connect(tmp_path / FILE)) as store:
        columns = {"study_user_attributes": "value_json", "trial_user_attributes": "value_json", "trial_params": "param_value"}
        keys = {table: [row[0] for row in store.execute(f"SELECT rowid FROM {table}")] for table in columns}
    assert all(keys.values())
    count = 0
    for table, column in columns.items():
        for value in (None, '"x"', "[[3]]", "1e999", "9" * 400, "-1", '{"a": [null]}', "[" * 2000):
            (tmp_path / FILE).write_bytes(whole)
            with closing(sqlite3.connect(tmp_path / FILE)) as store:
                store.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, keys[table][0]))
                store.commit()
            count += 1
            one_line(lambda: look(tmp_path), (table, value))
    assert count == 24


def test_refusals_are_ours() -> None:
    """The control of all tests here: what is no error of ours passes through."""
    with pytest.raises(ZeroDivisionError):
        one_line(lambda: 1 // 0, "")
    with pytest.raises(RegraftError):
        checked(regraft.settings.PruneSettings, {"ratio": "nan"}, "these")
