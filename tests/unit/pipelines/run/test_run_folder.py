from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.atomic import sha256_of
from regraft.claims import work_folder
from regraft.errors import InputError, OutputError
from regraft.pipelines.run.folder import RunFolder, changes, open_run

IDENTITY: dict[str, Any] = {"recipe": {"model": "x", "prune": {"ratio": 0.25}}}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that the promise of equal bytes is about."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


class Work:
    """Two stages that count how often they are made; the second is made from the first."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.said: list[str] = []

    def first(self, folder: Path) -> None:
        self.made.append("first")
        (folder / "weights").write_bytes(bytes(range(256)))
        (folder / "sub").mkdir()
        (folder / "sub" / "notes.txt").write_text("kept")

    def second(self, source: Path) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            self.made.append("second")
            (folder / "sum").write_text(str(sum((source / "weights").read_bytes())))

        return make

    def run(self, path: Path, *, resume: bool = False, identity: dict[str, Any] = IDENTITY, ratio: float = 0.25) -> list[str]:
        """Returns which stages were made this time."""
        before = len(self.made)
        with open_run(path, identity, resume=resume, say=self.said.append) as run:
            first = run.stage("first", {"ratio": ratio}, self.first)
            run.stage("second", {"files": run.checksums(first)}, self.second(first), folder="deep/second")
        return self.made[before:]


@pytest.fixture
def work() -> Work:
    return Work()


def test_a_run_makes_its_stages_with_manifests(tmp_path: Path, work: Work) -> None:
    assert work.run(tmp_path / "run") == ["first", "second"]
    manifest = json.loads((tmp_path / "run" / "first" / "manifest.json").read_text())
    assert manifest == {
        "stage": "first",
        "inputs": {"ratio": 0.25},
        "files": {name: sha256_of(tmp_path / "run" / "first" / name) for name in ("sub/notes.txt", "weights")},
    }
    assert (tmp_path / "run" / "deep" / "second" / "sum").read_text() == str(sum(range(256)))
    assert set(json.loads((tmp_path / "run" / "timings.json").read_text())) == {"first", "second"}


def test_a_folder_that_exists_is_refused(tmp_path: Path, work: Work) -> None:
    work.run(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="exists and holds a run: go on with it by `resume=True`"):
        work.run(tmp_path / "run")
    assert tree(tmp_path) == before
    assert work.made == ["first", "second"]


def test_resume_makes_nothing_twice(tmp_path: Path, work: Work) -> None:
    work.run(tmp_path / "run")
    before = tree(tmp_path)
    assert work.run(tmp_path / "run", resume=True) == []
    assert tree(tmp_path) == before
    assert work.said[-2:] == ["first: finished before, 2 files checked", "second: finished before, 1 files checked"]


def test_resume_of_nothing_begins(tmp_path: Path, work: Work) -> None:
    assert work.run(tmp_path / "run", resume=True) == ["first", "second"]


@pytest.mark.parametrize("damage", ["flip", "remove", "no manifest", "broken manifest", "cut"])
def test_a_damaged_stage_is_made_again_and_what_follows_is_kept(tmp_path: Path, work: Work, damage: str) -> None:
    work.run(tmp_path / "run")
    before = tree(tmp_path)
    stage = tmp_path / "run" / "first"
    match damage:
        case "flip":
            (stage / "weights").write_bytes(bytes(range(255)) + b"\0")
        case "remove":
            (stage / "sub" / "notes.txt").unlink()
        case "no manifest":
            (stage / "manifest.json").unlink()
        case "broken manifest":
            (stage / "manifest.json").write_text('{"files": 3}')
        case _:
            (stage / "weights").write_bytes(b"")
    assert work.run(tmp_path / "run", resume=True) == ["first"]
    assert any(line.startswith("first: made again, since ") for line in work.said)
    assert tree(tmp_path) == before


def test_other_inputs_make_a_stage_again_and_what_follows_from_it_only_if_it_differs(tmp_path: Path, work: Work) -> None:
    work.run(tmp_path / "run")
    assert work.run(tmp_path / "run", resume=True, ratio=0.5) == ["first"]


def test_another_recipe_is_refused_by_name(tmp_path: Path, work: Work) -> None:
    work.run(tmp_path / "run")
    before = tree(tmp_path)
    other = {"recipe": {"model": "x", "prune": {"ratio": 0.3}}}
    with pytest.raises(OutputError, match=r"begun differently: recipe\.prune\.ratio was 0\.25 and is now 0\.3; undo") as caught:
        work.run(tmp_path / "run", resume=True, identity=other)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, work: Work) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(OutputError, match=r"is not a run folder: it has no run\.json"):
        work.run(tmp_path / "photos", resume=True)
    assert tree(tmp_path) == {"photos/cat.jpg": b"cat"}


def fail(error: Exception) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    return make


def test_bad_input_in_the_first_stage_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError),
        open_run(tmp_path / "runs" / "run", IDENTITY, resume=False, say=print) as run,
    ):
        run.stage("first", {}, fail(InputError("the ratio cannot be met")))
    assert list(tmp_path.iterdir()) == []


def fail_beside_another_run(path: Path) -> None:
    with open_run(path, IDENTITY, resume=False, say=print) as run:
        (path.parent / "another").mkdir(exist_ok=True)
        run.stage("first", {}, fail(InputError("the ratio cannot be met")))


def test_bad_input_leaves_an_empty_folder_empty_and_other_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "runs" / "run"):
        with pytest.raises(InputError, match="cannot be met"):
            fail_beside_another_run(target)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["another", "empty", "runs", "runs/another"]


def fail_in_the_second(path: Path, work: Work) -> None:
    with open_run(path, IDENTITY, resume=False, say=print) as run:
        run.stage("first", {"ratio": 0.25}, work.first)
        run.stage("second", {}, fail(InputError("too short")))


def test_an_error_later_keeps_what_is_finished(tmp_path: Path, work: Work) -> None:
    with pytest.raises(InputError, match="too short"):
        fail_in_the_second(tmp_path / "run", work)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["first", "run.json", "timings.json"]
    assert work.run(tmp_path / "run", resume=True) == ["second"]


def test_summaries_are_rewritten_only_when_they_differ(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", IDENTITY, resume=False, say=print) as run:
        path = run.write("results.json", "{}")
        before = path.stat().st_mtime_ns
        run.write("results.json", "{}")
        assert path.stat().st_mtime_ns == before
        run.write("results.json", "[]")
        assert path.read_text() == "[]"


def test_work_is_kept_until_it_is_discarded(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", IDENTITY, resume=False, say=print) as run:
        (run.work("recover") / "checkpoint").write_text("1")
    with open_run(tmp_path / "run", IDENTITY, resume=True, say=print) as run:
        assert (run.work("recover") / "checkpoint").read_text() == "1"
        run.discard("recover")
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, work: Work, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as caught:
        work.run(tmp_path / name)
    assert "choose another `output`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"file": b"mine"}


HOLDER = """
import sys, time
from pathlib import Path
from regraft.pipelines.run.folder import open_run
with open_run(Path(sys.argv[1]), {"recipe": {"model": "x", "prune": {"ratio": 0.25}}}, resume=False, say=print) as run:
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds the lock of a run folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_two_runs_do_not_share_a_folder(tmp_path: Path, work: Work, holder: subprocess.Popen[str]) -> None:
    said = rf"is in use by process {holder.pid} on \S+ since [\d-]+ [\d:]+; wait for it or choose another `output`"
    with pytest.raises(OutputError, match=said):
        work.run(tmp_path / "run", resume=True)
    assert work.made == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, work: Work, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert work.run(tmp_path / "run", resume=True) == ["first", "second"]


KILLED = """
import os, signal, sys, time, threading
from pathlib import Path
from regraft.pipelines.run.folder import open_run
def slowly(text):
    def make(folder):
        for part in range(5):
            (folder / str(part)).write_text(text * 1000)
            time.sleep(0.01)
    return make
threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
with open_run(Path(sys.argv[1]), {"recipe": {}}, resume=True, say=print) as run:
    for name in ("one", "two", "three"):
        run.stage(name, {}, slowly(name))
    run.write("results.json", "{}")
    run.discard("one")
os._exit(0)
"""


def run_until_killed(path: Path, delay: float) -> int:
    """Returns the exit code of a run that is killed after some seconds."""
    command = [sys.executable, "-c", KILLED, str(path), str(delay)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def test_killed_between_making_and_marking_its_first_folder_it_goes_on(tmp_path: Path, work: Work) -> None:
    work_folder(tmp_path / "run" / "run.json").mkdir(parents=True)
    assert work.run(tmp_path / "run", resume=True) == ["first", "second"]
    (tmp_path / "other" / ".mine.regraft").mkdir(parents=True)
    with pytest.raises(OutputError, match="is not a run folder"):
        work.run(tmp_path / "other", resume=True)
    assert (tmp_path / "other" / ".mine.regraft").is_dir()


@pytest.mark.long
def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    """Kills a run of three stages again and again, each time a little later, until it gets through."""
    assert run_until_killed(tmp_path / "calm", 60) == 0
    codes, delay, started = [], 0.003, time.monotonic()
    while not codes or codes[-1] != 0:
        codes.append(run_until_killed(tmp_path / "killed", delay))
        delay *= 1.25
        assert time.monotonic() - started < 120
    assert codes.count(-signal.SIGKILL) >= 3
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")


def test_changes_name_every_key() -> None:
    before = {"a": 1, "b": {"c": 2, "d": None}, "e": {"f": 1}}
    after = {"a": 1, "b": {"c": 3, "d": "x"}, "e": None, "g": 5}
    assert changes(before, after) == [
        "b.c was 2 and is now 3",
        "b.d was left out and is now x",
        "e was given and is now left out",
        "g was left out and is now 5",
    ]


def test_a_run_folder_knows_no_more_than_its_path(tmp_path: Path) -> None:
    assert RunFolder(tmp_path, print).seconds() == {}


def test_an_error_after_scores_were_kept_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    def fails() -> None:
        with open_run(tmp_path / "run", {"a": 1}, resume=False, say=lambda line: None) as folder:
            (folder.path / "scores").mkdir()
            raise OutputError("the disk is full")

    with pytest.raises(OutputError, match="full"):
        fails()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "scores"]
    with open_run(tmp_path / "run", {"a": 1}, resume=True, say=lambda line: None):
        pass
