from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.atomic import atomic_file, atomic_folder, is_disk_full, refuse_existing, sha256_of, write_text
from regraft.errors import OutputError


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fail_half_way(target: Path, error: BaseException, *, replace: bool = False) -> None:
    """Begins to write a folder, then raises."""
    with atomic_folder(target, replace=replace) as partial:
        (partial / "a").write_text("half")
        raise error


def fail_in_a_file(path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_text("half")
        raise KeyError("half way")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("1")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("2")
        assert not target.exists()
    assert tree(tmp_path) == {"deep/model/a": b"1", "deep/model/sub/b": b"2"}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "model", KeyError("half way"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_replacing_leaves_the_old(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("old")
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "model", KeyError("half way"), replace=True)
    assert tree(tmp_path) == {"model/a": b"old"}


def test_replacing_removes_what_the_manifest_lists_and_sets_the_rest_beside(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "model", replace=True) as partial:
            (partial / name).write_text(name)
            (partial / "manifest.json").write_text(json.dumps({"files": {name: "its checksum"}}))
        if name == "a":
            (tmp_path / "model" / "sub").mkdir()
            (tmp_path / "model" / "sub" / "mine").write_text("mine")
    found = tree(tmp_path)
    assert set(found) == {"model/b", "model/manifest.json", "model.before/sub/mine"}
    assert found["model.before/sub/mine"] == b"mine"


def test_without_a_manifest_only_what_is_the_same_goes(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "model", replace=True) as partial:
            (partial / "same").write_text("same")
            (partial / "other").write_text(text)
    assert tree(tmp_path) == {"model/same": b"same", "model/other": b"new", "model.before/other": b"old"}


@pytest.mark.parametrize("kind", ["file", "full folder", "broken link"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    if kind == "file":
        target.write_text("mine")
    elif kind == "full folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"exists; choose another `output`"), atomic_folder(target):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == before


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refuse_existing(tmp_path / "model")
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("1")
    assert tree(tmp_path) == {"model/a": b"1"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError) as caught:
        fail_half_way(tmp_path / "model", OSError(number, "no room"))
    message = str(caught.value)
    assert "disk is full" in message
    assert str(tmp_path / "model") in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_behind_other_errors() -> None:
    outer = RuntimeError("could not save")
    outer.__cause__ = OSError(errno.ENOSPC, "no room")
    assert is_disk_full(outer)
    assert not is_disk_full(RuntimeError("could not save"))
    assert not is_disk_full(OSError(errno.EACCES, "not allowed"))


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"), atomic_folder(tmp_path / "notes.txt" / "model"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"notes.txt": b"mine"}


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert tree(tmp_path) == {"plan.json": b"new"}


def test_a_file_keeps_its_old_text_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")
    with pytest.raises(KeyError):
        fail_in_a_file(path)
    assert tree(tmp_path) == {"plan.json": b"old"}


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "naïve ☃\n")
    assert (tmp_path / "a").read_bytes() == "naïve ☃\n".encode()


def test_sha256_matches_hashlib(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


KILLED = """
import os, signal, sys
from pathlib import Path
from regraft.atomic import atomic_folder
with atomic_folder(Path(sys.argv[1]), replace=True) as partial:
    (partial / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_and_the_next_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("old")
        (partial / "manifest.json").write_text('{"files": {"a": ""}}')
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (target / "a").read_text() == "old"
    with atomic_folder(target, replace=True) as partial:
        assert list(partial.iterdir()) == []
        (partial / "a").write_text("new")
    assert tree(tmp_path) == {"model/a": b"new"}


def test_files_get_the_rights_that_new_files_have(tmp_path):
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "model.safetensors").touch(mode=0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == (tmp_path / "plain").stat().st_mode & 0o777


@pytest.mark.parametrize("replace", [False, True])
def test_a_disk_that_fills_when_the_name_is_flushed_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool) -> None:
    target, file = tmp_path / "in" / "model", tmp_path / "in" / "file"
    if replace:
        with atomic_folder(target) as partial:
            (partial / "a").write_text("old")
            write_text(file, "old")
    before = tree(tmp_path)
    real = os.fsync

    def full(handle: int) -> None:
        if os.path.samefile(f"/proc/self/fd/{handle}", tmp_path / "in"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="disk is full"), atomic_folder(target, replace=replace) as partial:
            (partial / "a").write_text("new")
        assert tree(tmp_path) == before
        write_text(file, "new")  # a file is whole before and after
    assert file.read_text() == "new"
