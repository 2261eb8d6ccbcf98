"""The run folder: stages that are complete or absent, checksums, and resuming of a stopped run.

::

    runs/quickstart/
      run.json          the recipe and what it read, by checksum: --resume goes on only with the same
      timings.json      how long each stage took; differs from run to run
      pruned/           a stage: its files and manifest.json (what it was made from, SHA-256 of every file)
      …

A stage is made in a temporary folder and renamed when it is complete, so that ``kill -9`` leaves it finished or absent. The inputs of
a stage are recorded by value and checksum; a stage whose files or inputs do not match is made again. Files named ``timings.json`` hold
seconds and speeds and have no checksums. All other files have the same bytes for interrupted and uninterrupted runs (on one machine, with
one set of library versions).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.atomic import MANIFEST, atomic_folder, refuse_existing, sha256_of, sweep, write_text
from regraft.claims import SUFFIX, WORK, claimed, is_mark, is_work_folder, lock_file, remove, resolved, work_folder
from regraft.errors import OutputError, shown
from regraft.progress import Say
from regraft.reading import entry, is_file, read_object

RUN_FILE = "run.json"
TIMINGS = "timings.json"
LOCK = ".lock"


class RunFolder:
    """A folder that holds one run; made by :func:`open_run`.

    Args:
        path: The folder.
        say: Called with one line at each step of progress.
    """

    def __init__(self, path: Path, say: Say) -> None:
        self.path = path
        self._say = say
        self._written: set[Path] = set()
        self.made = 0

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None], *, folder: str | None = None) -> Path:
        """Makes a stage, unless it is present, complete, and made from the same inputs.

        Args:
            name: Name of the stage, such as ``prune``.
            inputs: Inputs of the stage, as plain JSON types: settings and checksums, but nothing that differs from run to run.
            make: Writes the files of the stage into a given empty folder.
            folder: Folder of the files within the run; None for the name.

        Returns:
            The stage's folder.

        Raises:
            OutputError: The stage cannot be written; existing files are not changed.
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
            write_text(partial / MANIFEST, plain_json(manifest))
        seconds = time.perf_counter() - started
        self._note_seconds(name, seconds)
        self._say(f"{name}: done in {seconds:.1f} s")
        self.made += 1
        return path

    def checksums(self, path: Path) -> dict[str, str]:
        """Returns the SHA-256 of every file of a finished stage, by name, for the inputs of later stages."""
        return dict(entry(read_object(path / MANIFEST, OutputError), "files", dict, f"'{path / MANIFEST}'", OutputError))

    def seconds(self) -> dict[str, float]:
        """Returns the duration of each stage in seconds, by name, as far as it is known."""
        try:
            found = read_object(self.path / TIMINGS, OutputError)
        except OutputError:
            return {}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def write(self, name: str, text: str) -> Path:
        """Writes a file that summarises stages, completely or not at all, and only if its contents changed."""
        path = self.path / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
            self._written.add(path)
        return path

    def work(self, name: str) -> Path:
        """Returns a folder for a stage's checkpoints, which :meth:`discard` removes."""
        with claimed(self.path / name) as aside:
            (aside / WORK).mkdir(exist_ok=True)
            return aside / WORK

    def discard(self, name: str) -> None:
        """Removes a stage's work folder."""
        with claimed(self.path / name) as aside:
            remove(aside / WORK)

    def forget(self) -> None:
        """Removes the summary files and the stages' work folders, and nothing else; nothing at all where there is more, such as scores.

        A folder with contents and without its recipe could not be gone on with.
        """
        if any(entry.name != LOCK and entry not in self._written and not is_work_folder(entry) for entry in self.path.iterdir()):
            return
        for path in self._written:
            path.unlink(missing_ok=True)
        for left in [left for left in self.path.iterdir() if is_work_folder(left)]:
            remove(left)

    def tidy(self) -> None:
        """Removes the work folders that killed runs have left inside of stages; the run is finished, and this process holds its lock."""
        for left in [left for left in self.path.rglob(f".*{SUFFIX}") if is_work_folder(left) and left.parent != self.path]:
            remove(left)

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Compares the folder's recipe with this one, or writes this one into a new folder.

        Raises:
            OutputError: The recipes differ, or the folder's cannot be read.
        """
        file = self.path / RUN_FILE
        if not file.is_file():
            self.write(RUN_FILE, plain_json(identity))
            return
        try:
            before = read_object(file, OutputError)
        except OutputError as error:
            raise OutputError(f"'{file}' is damaged ({error}); remove the folder and run again") from None
        differing = changes(before, json.loads(plain_json(identity)))
        if differing:
            raise OutputError(
                f"run folder '{self.path}' was begun differently: {'; '.join(differing)}; undo the change to resume, or choose another "
                "`output`"
            )

    def _why_not_finished(self, path: Path, inputs: Mapping[str, Any]) -> str | None:
        """Returns None for a finished stage, "" for an absent one, and otherwise the problem."""
        if not path.exists():
            return ""
        try:
            manifest = read_object(path / MANIFEST, OutputError)
            files, made_from = dict(manifest["files"]), manifest["inputs"]
        except (OutputError, ValueError, KeyError, TypeError):
            return f"its {MANIFEST} is missing or damaged"
        for name, checksum in files.items():
            if not lies_in(name, path):
                return f"its {MANIFEST} names '{shown(name)}', which is not in it"
            file = path / name
            if not is_file(file):
                return f"{path.name}/{shown(name)} is missing"
            if sha256_of(file) != checksum:
                return f"{path.name}/{shown(name)} does not match its checksum"
        return None if made_from == json.loads(plain_json(inputs)) else "what it is made from has changed"

    def _note_seconds(self, name: str, seconds: float) -> None:
        self.write(TIMINGS, plain_json(self.seconds() | {name: round(seconds, 3)}))


def refuse_begun(path: Path) -> None:
    """Refuses an output that is neither new nor an empty folder; a run that is there already is named as one.

    Raises:
        OutputError: The message says which.
    """
    if (path / RUN_FILE).is_file():
        raise OutputError(f"'{shown(path)}' exists and holds a run: go on with it by `resume=True`, or choose another `output`")
    refuse_existing(path, in_place=True)


@contextmanager
def open_run(path: Path, identity: Mapping[str, Any], *, resume: bool, say: Say) -> Iterator[RunFolder]:
    """Opens a run folder for this process alone.

    Args:
        path: The folder.
        identity: The recipe and the checksums of its input files, as plain JSON types.
        resume: Whether to continue with an existing folder.
        say: Called with one line at each step of progress.

    Yields:
        The run folder. If the block fails before the first stage of a new folder is finished, the folder is removed.

    Raises:
        OutputError: The folder exists and ``resume`` is off; or it is no run folder, another process uses it, or it was begun
            with another recipe.
    """
    if not resume:
        refuse_begun(path)
    path = resolved(path)
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError(f"output '{shown(path)}' exists and is no folder; choose another `output`")
    if path.is_dir() and not (path / RUN_FILE).is_file() and not all(_left_before_it_began(entry) for entry in path.iterdir()):
        raise OutputError(f"'{shown(path)}' is not a run folder: it has no {RUN_FILE}; choose another `output`")
    made = _make_folder(path)
    try:
        with lock_file(path / LOCK, path):
            sweep(path)
            folder = RunFolder(path, say)
            try:
                folder.begin(identity)
                yield folder
                folder.tidy()
            except Exception:
                if not resume and not any(path.rglob(MANIFEST)):
                    folder.forget()
                raise
    except Exception:
        _remove_empty(made)
        raise


def _left_before_it_began(entry: Path) -> bool:
    """Returns whether an entry was left by a run that was killed before it wrote its first file, or marked that file's folder."""
    unmarked = entry == work_folder(entry.with_name(RUN_FILE)) and entry.is_dir() and not any(entry.iterdir())
    return unmarked or is_work_folder(entry) or (entry.name == LOCK and is_mark(entry))


def _make_folder(path: Path) -> list[Path]:
    """Makes a folder and its parents; returns the new ones, innermost first."""
    missing = [parent for parent in (path, *path.parents) if not os.path.lexists(parent)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{shown(path)}': {error.strerror}; choose another `output`") from None
    return missing


def _remove_empty(made: list[Path]) -> None:
    """Removes the folders that were made for a run, unless they have contents."""
    for folder in made:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def lies_in(name: str, folder: Path) -> bool:
    """Returns whether a name in a manifest is a path within its folder, with links resolved; other paths are never opened."""
    try:
        return resolved(folder) in resolved(folder / name).parents
    except OutputError:
        return False


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns the differences between two nested mappings of plain data.

    >>> changes({"prune": {"ratio": 0.25}, "seed": 0}, {"prune": {"ratio": 0.3}, "seed": 0})
    ['prune.ratio was 0.25 and is now 0.3']
    """
    found: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new, name = before.get(key), after.get(key), f"{prefix}{key}"
        match old, new:
            case Mapping(), Mapping():
                found += changes(old, new, f"{name}.")
            case _ if old != new:
                found.append(f"{name} was {_short(old)} and is now {_short(new)}")
            case _:
                pass
    return found


def _short(value: Any) -> str:
    match value:
        case None:
            return "left out"
        case Mapping():
            return "given"
        case _:
            return str(value)


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, by name, except timings."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != TIMINGS)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def plain_json(value: Any) -> str:
    """Returns plain values as the JSON of a file for people."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
