"""The run folder: every stage whole or absent, checked by checksums, and a run that goes on where it stopped.

::

    runs/quickstart/
      run.json          the recipe and what it read, by checksum: --resume goes on only with the same
      timings.json      how long each stage took; differs from run to run
      pruned/           a stage: its files and manifest.json (what it was made from, SHA-256 of every file)
      …

A stage is made in a folder aside and renamed when it is whole, so that ``kill -9`` leaves it finished or not begun. What a stage
was made from is recorded by value and checksum; a stage whose files or inputs do not match is made again. Files named
``timings.json`` hold seconds and speeds; they are outside the checksums. Everything else is the same, byte by byte, whether a run
was interrupted or not (on one machine, with one set of library versions).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from regraft.atomic import atomic_folder, refuse_existing, sha256_of, write_text
from regraft.errors import OutputError

RUN_FILE = "run.json"
MANIFEST = "manifest.json"
TIMINGS = "timings.json"
LOCK = ".lock"

Say = Callable[[str], None]


class RunFolder:
    """A folder that holds one run; made by :func:`open_run`.

    Args:
        path: The folder.
        say: Called with one line for each thing a user wants to know.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self.path = path
        self._say = say
        self.made = 0

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None], *, folder: str | None = None) -> Path:
        """Makes a stage, unless it is there, whole, and made from the same.

        Args:
            name: What the stage is called, such as ``prune``.
            inputs: What it is made from, as plain JSON types: settings and checksums. Nothing that differs from run to run.
            make: Writes the files of the stage into the empty folder that it is given.
            folder: Where the files end up, inside the run; default: the name.

        Returns:
            The stage's folder.

        Raises:
            OutputError: It cannot be written; what was there before is untouched.
        """
        path = self.path / (folder or name)
        problem = self._why_not_finished(path, inputs)
        if problem is None:
            self._say(f"{name}: finished before, {len(self.checksums(path))} files checked")
            return path
        if problem:
            self._say(f"{name}: made again, since {problem}")
        self._say(f"{name} …")
        started = time.perf_counter()
        with atomic_folder(path, replace=True) as partial:
            make(partial)
            manifest = {"stage": name, "inputs": inputs, "files": _checksums(partial)}
            write_text(partial / MANIFEST, _json(manifest))
        seconds = time.perf_counter() - started
        self._note_seconds(name, seconds)
        self._say(f"{name}: done in {seconds:.1f} s")
        self.made += 1
        return path

    def checksums(self, path: Path) -> dict[str, str]:
        """Returns the SHA-256 of every file of a finished stage, by name, for the inputs of the stages that follow."""
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]

    def seconds(self) -> dict[str, float]:
        """Returns how long each stage took, by name, as far as it is known."""
        try:
            return json.loads((self.path / TIMINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def write(self, name: str, text: str) -> Path:
        """Writes a file that summarises stages; it is whole or as it was before, and only rewritten when it differs."""
        path = self.path / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
        return path

    def work(self, name: str) -> Path:
        """Returns a folder for what a stage keeps while it is being made: checkpoints. :meth:`discard` removes it."""
        path = self.path / f".{name}.work"
        path.mkdir(exist_ok=True)
        return path

    def discard(self, name: str) -> None:
        """Removes a stage's work folder."""
        shutil.rmtree(self.path / f".{name}.work", ignore_errors=True)

    def _why_not_finished(self, path: Path, inputs: Mapping[str, Any]) -> str | None:
        """Returns None for a finished stage, "" for one that is not there, and otherwise what is wrong with it."""
        if not path.exists():
            return ""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files, made_from = dict(manifest["files"]), manifest["inputs"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"its {MANIFEST} is missing or damaged"
        for name, checksum in files.items():
            file = path / name
            if not file.is_file():
                return f"{path.name}/{name} is missing"
            if sha256_of(file) != checksum:
                return f"{path.name}/{name} does not match its checksum"
        return None if made_from == json.loads(_json(inputs)) else "what it is made from has changed"

    def _note_seconds(self, name: str, seconds: float) -> None:
        write_text(self.path / TIMINGS, _json(self.seconds() | {name: round(seconds, 3)}))


@contextmanager
def open_run(path: Path, identity: Mapping[str, Any], *, resume: bool, say: Say) -> Iterator[RunFolder]:
    """Opens a run folder for this process alone.

    Args:
        path: The folder.
        identity: The recipe and the checksums of what it reads, as plain JSON types.
        resume: Go on with the folder if it exists.
        say: Called with one line for each thing a user wants to know.

    Yields:
        The run folder. When the block fails before the first stage of a new folder is finished, the folder is removed again.

    Raises:
        OutputError: The folder exists and ``resume`` is off; or it is no run folder, another process uses it, or it was begun
            with another recipe.
    """
    path = path.absolute()
    if not resume:
        refuse_existing(path)
    elif path.exists() and not (path / RUN_FILE).is_file() and _holds_files(path):
        raise OutputError(f"'{path}' is not a run folder: it has no {RUN_FILE}; choose another --output")
    made = _make_folder(path)
    with _locked(path):
        try:
            _clear_half_written(path)
            _check_identity(path, identity)
            folder = RunFolder(path, say)
            yield folder
        except Exception:
            if not resume and not any(path.rglob(MANIFEST)):
                _unmake(path, made)
            raise


def _holds_files(path: Path) -> bool:
    """Returns whether there is anything but what a run leaves before it has begun: its lock and half-written files."""
    return any(not entry.name.startswith(".") for entry in path.iterdir())


def _make_folder(path: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were not there, innermost first."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}; choose another --output") from None
    return missing


def _unmake(path: Path, made: list[Path]) -> None:
    """Empties a run folder and removes the folders that were made for it, unless somebody else has put something there."""
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    for folder in made:
        if any(folder.iterdir()):
            return
        folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the folder's lock; the operating system drops it when the process dies, however it dies."""
    file, owner = path / LOCK, path / f"{LOCK}.owner"
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"run folder '{path}' is in use by {_named(owner)}; wait for it or choose another --output") from None
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}; choose another --output") from None
    try:
        owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()  # the empty lock file stays: removing it would let two others lock two files of one name


def _named(owner: Path) -> str:
    try:
        return f"process {owner.read_text(encoding='utf-8').strip()}"
    except OSError:
        return "another process"


def _clear_half_written(path: Path) -> None:
    """Removes what a killed process left aside."""
    for entry in [*path.glob("**/.*.partial"), *path.glob("**/.*.old")]:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)  # it may have stood in a folder that is gone by now


def _check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Compares a folder's recipe with this one, or writes it into a new folder."""
    file = path / RUN_FILE
    wanted = json.loads(_json(identity))
    if not file.is_file():
        write_text(file, _json(identity))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise OutputError(f"'{file}' is damaged; remove the folder and run again") from None
    differing = changes(before, wanted)
    if differing:
        raise OutputError(
            f"run folder '{path}' was begun differently: {'; '.join(differing)}; undo the change to resume, or choose another --output"
        )


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns what differs between two nested mappings of plain data.

    >>> changes({"prune": {"ratio": 0.25}, "seed": 0}, {"prune": {"ratio": 0.3}, "seed": 0})
    ['prune.ratio was 0.25 and is now 0.3']
    """
    found: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new, name = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {_short(old)} and is now {_short(new)}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "given"
    return "left out" if value is None else str(value)


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, by name, timings left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != TIMINGS)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
