"""Nothing of a user's is removed or replaced, and one output has one process: generated kinds of outputs, and races."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from regraft import claims
from regraft.atomic import atomic_file, atomic_folder, json_with, refuse_existing, reserved, reserved_file, sweep, write_text
from regraft.claims import MARK, claimed, is_work_folder, work_folder
from regraft.errors import OutputError


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder, by name: files with their bytes, links with where they lead, folders."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


USERS: dict[str, Callable[[Path], Path]] = {}
"""Makes something of a user's in a folder and returns the output that must be refused."""


def users(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    USERS[make.__name__] = make
    return make


@users
def a_folder_by_way_of_a_new_one(home: Path) -> Path:
    (home / "mine").write_text("mine")
    return home / "new" / ".."


@users
def a_folder_of_dot_files(home: Path) -> Path:
    for name in (".bashrc.old", ".x.partial", ".lock"):
        (home / name).write_text("mine")
    (home / ".ssh.old").mkdir()
    (home / ".ssh.old" / "id").write_text("mine")
    return home


@users
def a_link_to_a_full_folder(home: Path) -> Path:
    (home / "full").mkdir()
    (home / "full" / "mine").write_text("mine")
    (home / "out").symlink_to("full")
    return home / "out"


@users
def a_link_to_nothing(home: Path) -> Path:
    (home / "out").symlink_to("nowhere")
    return home / "out"


@users
def a_link_that_leads_to_itself(home: Path) -> Path:
    (home / "out").symlink_to("out")
    return home / "out"


@users
def a_file(home: Path) -> Path:
    (home / "out").write_text("mine")
    return home / "out"


@users
def a_pipe(home: Path) -> Path:
    os.mkfifo(home / "out")
    return home / "out"


@users
def below_a_file(home: Path) -> Path:
    (home / "file").write_text("mine")
    return home / "file" / "out"


@users
def a_foreign_folder_of_the_work_folders_name(home: Path) -> Path:
    (home / ".out.regraft").mkdir()
    (home / ".out.regraft" / "new").write_text("mine")
    return home / "out"


@users
def a_foreign_mark_in_the_work_folder(home: Path) -> Path:
    (home / ".out.regraft").mkdir()
    (home / ".out.regraft" / "owner.json").write_text('{"owner": "me"}')
    return home / "out"


@users
def a_link_of_the_work_folders_name(home: Path) -> Path:
    (home / "full").mkdir()
    (home / "full" / "new").write_text("mine")
    (home / ".out.regraft").symlink_to("full")
    return home / "out"


@users
def a_name_that_is_too_long(home: Path) -> Path:
    return home / ("n" * 256)


@users
def a_name_with_a_zero_byte(home: Path) -> Path:
    return home / "a\0b"


def write_folder(path: Path) -> None:
    with atomic_folder(path) as partial:
        (partial / "a").write_text("ours")


def reserve_folder(path: Path) -> None:
    with reserved(path):
        write_folder(path)


def reserve_file(path: Path) -> None:
    with reserved_file(path):
        write_text(path, "ours")


WAYS = {way.__name__: way for way in (write_folder, reserve_folder, reserve_file)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", USERS)
def test_what_is_not_ours_is_refused_in_one_line_and_untouched(tmp_path: Path, kind: str, way: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    output = USERS[kind](home)
    before = tree(home)
    with pytest.raises(OutputError) as caught:
        WAYS[way](output)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 1000
    assert tree(home) == before


@pytest.mark.parametrize("name", [".out.old", ".out.partial", ".out.work", "out.before", "out.old", ".regraft", ".out.regraft.old"])
def test_neighbours_with_suspicious_names_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    for _ in range(2):
        with atomic_folder(tmp_path / "out", replace=True) as partial:
            (partial / "a").write_text("ours")
        write_text(tmp_path / "out.json", "ours")
    assert tree(tmp_path) == {name: "folder", f"{name}/mine": b"mine", "out": "folder", "out/a": b"ours", "out.json": b"ours"}


def test_a_link_to_an_empty_folder_stays_and_its_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    write_folder(tmp_path / "out")
    assert tree(tmp_path) == {"disk": "folder", "disk/a": b"ours", "out": "disk"}


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the current folder"):
        write_folder(Path())
    refuse_existing(Path(), in_place=True)


@pytest.mark.parametrize("name", ["n" * 255, "n" * 240, "é" * 127, "[red]", "a b", "-x", "bytes \udcff", "a\nb", "\x1b[31m"])
def test_unusual_names_simply_work(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / name)
    write_text(tmp_path / "file" / name, "ours")
    assert tree(tmp_path) == {name: "folder", f"{name}/a": b"ours", "file": "folder", f"file/{name}": b"ours"}
    work_folder(tmp_path / name).name.encode()  # which libraries in Rust have to open


@pytest.mark.parametrize("kind", ["device", "pipe", "link", "folder"])
def test_a_file_takes_no_place_of_something_special(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "mine").write_text("mine")
        path.symlink_to("mine")
    elif kind == "folder":
        path.mkdir()
    before = path.lstat()
    for way in (reserve_file, lambda path: write_text(path, "ours")):
        with pytest.raises(OutputError):
            way(path)
    assert os.path.samestat(before, path.lstat())


@pytest.mark.parametrize(
    ("content", "fine"), [("", True), ('{"model": 1, "rmse": 2}', True), ('{"model": 1}', False), ("user,item\n", False)]
)
def test_a_file_is_replaced_only_where_it_is_ours(tmp_path: Path, content: str, fine: bool) -> None:
    path = tmp_path / "figures.json"
    path.write_text(content)
    if fine:
        with reserved_file(path, json_with("model", "rmse")):
            write_text(path, "new")
    else:
        with pytest.raises(OutputError, match="exists"), reserved_file(path, json_with("model", "rmse")):
            pytest.fail("must not run")
    assert path.read_text() == ("new" if fine else content)


@pytest.mark.parametrize("error", [OSError(22, "no"), KeyError("x"), KeyboardInterrupt(), OutputError("ours")])
def test_an_error_while_a_nested_file_is_written_is_no_cause_of_itself(tmp_path: Path, error: BaseException) -> None:
    def nested() -> None:
        with atomic_folder(tmp_path / "out") as partial, atomic_file(partial / "x"):
            raise error

    with pytest.raises(type(error)) as caught:
        nested()
    seen: set[int] = set()
    one: BaseException | None = caught.value
    while one is not None:
        assert id(one) not in seen
        seen.add(id(one))
        one = one.__cause__ or one.__context__
    assert list(tmp_path.iterdir()) == []


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed an output."""
    code = "import sys\nfrom pathlib import Path\nfrom regraft.claims import claimed\nwith claimed(Path(sys.argv[1])) as work:\n"
    code += "    (work / 'new').mkdir(exist_ok=True)\n    print('held', flush=True)\n    sys.stdin.read()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_is_told_who_and_since_when_and_a_dead_owner_is_taken_over(tmp_path: Path) -> None:
    with another_process(tmp_path / "out") as process:
        for way in WAYS.values():
            if way is not reserve_file:
                said = rf"in use by process {process.pid} on \S+ since \d+-\d+-\d+ \d+:\d+:\d+; wait for it"
                with pytest.raises(OutputError, match=said):
                    way(tmp_path / "out")
        with pytest.raises(OutputError, match=f"process {process.pid}"):
            reserve_folder(tmp_path / "elsewhere" / ".." / "out")
        process.kill()
        process.wait()
        write_folder(tmp_path / "out")
    assert tree(tmp_path) == {"out": "folder", "out/a": b"ours"}


def test_a_second_thread_is_another_writer(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            write_folder(tmp_path / "out")
        except OutputError as error:
            refused.append(str(error))

    with reserved(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        write_folder(tmp_path / "out")
    assert len(refused) == 1
    assert f"process {os.getpid()}" in refused[0]


def test_fifty_races_end_with_one_whole_folder_each(tmp_path: Path) -> None:
    def write(path: Path, text: str, done: list[str]) -> None:
        try:
            with atomic_folder(path) as partial:
                for name in "abc":
                    (partial / name).write_text(text)
            done.append(text)
        except OutputError:
            pass

    for number in range(50):
        path, done = tmp_path / str(number), []
        threads = [threading.Thread(target=write, args=(path, text, done)) for text in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == 1
        assert tree(path) == dict.fromkeys("abc", done[0].encode())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(map(str, range(50)))


def killed_between(tmp_path: Path, *renames: str) -> Path:
    """What is left of a replacement that was killed after some of its renames."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    (out / "manifest.json").write_text(json.dumps({"files": {"a": ""}}))
    with claimed(out) as work:
        (work / "new").mkdir()
        (work / "new" / "a").write_text("new")
        if "old" in renames:
            out.rename(work / "old")
        if "new" in renames:
            (work / "new").rename(out)
    return work


@pytest.mark.parametrize(("renames", "kept"), [((), b"old"), (("old",), b"old"), (("old", "new"), b"new")])
def test_a_kill_between_two_renames_is_ended(tmp_path: Path, renames: tuple[str, ...], kept: bytes) -> None:
    work = killed_between(tmp_path, *renames)
    assert is_work_folder(work)
    sweep(tmp_path)
    assert not work.exists()
    assert tree(tmp_path / "out")["a"] == kept
    with atomic_folder(tmp_path / "out", replace=True) as partial:
        (partial / "b").write_text("newer")
    assert tree(tmp_path / "out") == {"b": b"newer"}


def test_the_mark_of_a_kill_after_the_last_rename_goes_with_the_next_refusal(tmp_path: Path) -> None:
    with claimed(tmp_path / "out") as work:
        mark = (work / MARK).read_bytes()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
    for name, stays in ((MARK, False), ("work", True)):  # what is kept to go on from stays
        work.mkdir()
        (work / MARK).write_bytes(mark)
        (work / name).touch()
        with pytest.raises(OutputError, match="exists"), reserved(tmp_path / "out"):
            pass
        assert work.exists() == stays
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_a_clock_that_is_set_anew_makes_no_owner_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks, which the start of the owner's process has to replace."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claimed(tmp_path / "out"):
        clock = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: clock(self) + 86400.0)
        owner = json.loads((work_folder(tmp_path / "out") / MARK).read_text())
        assert claims._lives(owner)
        assert not claims._lives(owner | {"started": owner["started"] + 1})


@pytest.mark.parametrize("name", ["~", "~/x", "~/x.json"])
def test_a_home_that_no_shell_has_replaced_is_no_output(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is expanded, so that a folder of that name could not be found again, and `rm -r` of it would mean another."""
    monkeypatch.chdir(tmp_path)
    for write in (refuse_existing, lambda path: write_text(path, "x"), lambda path: atomic_folder(path).__enter__()):
        with pytest.raises(OutputError, match="begins with ~, which no shell has replaced"):
            write(Path(name))
    write_text(tmp_path / "~nosuchuser", "x")
    assert os.listdir(tmp_path) == ["~nosuchuser"]
