"""The work folder next to an output, which marks the output as ours and locks it for one process.

An output ``NAME`` is written first into the folder ``.NAME.regraft`` next to it::

    .NAME.regraft/
      owner.json   the mark that the folder is ours, and the lock: which process, of which machine, since when
      new          what is being written; renamed to NAME when it is whole
      old          what was at NAME before, until new is in its place
      work         what a command keeps to go on from, such as checkpoints

The lock on ``owner.json`` is one of the operating system, which releases it when the process ends in any way; the next process takes the
folder over. A folder of that name without the mark belongs to somebody else and is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from regraft.errors import OutputError, shown
from regraft.platforms import MARK_FLAGS, lock, read_start, remove_and_close, write_start
from regraft.reading import home_expanded

MARK = "owner.json"
SUFFIX = ".regraft"
WORK = "work"
_LONGEST_NAME_BYTES = 255  # of Linux's and macOS's file systems
_MARK_BYTES = 4096
_AGAIN_SECONDS = 0.05
_FORMAT = "regraft work folder"

_held: dict[tuple[str, int], int] = {}  # how often a thread of this process is inside of a claim, by work folder and thread


def resolved(path: Path) -> Path:
    """Returns a path without links, ``.`` and ``..``: two names of one output are one output.

    Raises:
        OutputError: It cannot be a path, or begins with ``~``, which shells replace and everything that is read expands.
    """
    if home_expanded(path) != path:
        raise OutputError(f"'{shown(path)}' begins with ~, which no shell has replaced; write the home folder out, as $HOME/NAME")
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise OutputError(f"'{shown(path)}' cannot be a path: {getattr(error, 'strerror', None) or error}; choose another name") from None


def work_folder(path: Path) -> Path:
    """Returns the work folder of an output; of a name that is too long or no UTF-8 it is called by the name's SHA-256."""
    path = resolved(path)
    name = os.fsencode(path.name)
    try:
        short = len(name) + len(f".{SUFFIX}") <= _LONGEST_NAME_BYTES and bool(name.decode())
    except UnicodeDecodeError:
        short = False
    return path.with_name(f".{path.name if short else hashlib.sha256(name).hexdigest()[:32]}{SUFFIX}")


def output_of(work: Path) -> Path:
    """Returns the output that a folder in its work folder is for; the folder itself where it lies elsewhere."""
    aside = work.parent
    return aside.with_name(aside.name.removeprefix(".").removesuffix(SUFFIX)) if aside.name.endswith(SUFFIX) else work


def is_work_folder(folder: Path) -> bool:
    """Returns whether a folder carries our mark."""
    return folder.name.endswith(SUFFIX) and not folder.is_symlink() and is_mark(folder / MARK)


def is_mark(file: Path) -> bool:
    """Returns whether a file is a mark of ours, signed or still empty as its owner was killed."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return False
        content = file.read_bytes()[:_MARK_BYTES]
    except OSError:
        return False
    return not content or _owner_in(content) is not None


def in_work_folder(path: Path) -> bool:
    """Returns whether a path lies inside of a work folder of ours: then all of it is ours."""
    return any(is_work_folder(parent) for parent in path.parents if parent.name.endswith(SUFFIX))


@contextmanager
def claimed(path: Path, *, wait_seconds: float = 0.0) -> Iterator[Path]:
    """Claims an output for this process while the block runs; inside of a claim of the same thread it does nothing more.

    Args:
        path: The output, a file or a folder. Missing parents are made, and removed again where they stay empty.
        wait_seconds: How long to wait for another process.

    Yields:
        The work folder. It goes at the end, unless something is left in it.

    Raises:
        OutputError: Another process is writing this output, or the work folder cannot be made, or is somebody else's.
    """
    path = resolved(path)
    folder = work_folder(path)
    key = (str(folder), threading.get_ident())
    if key in _held:
        yield folder
        return
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder, path, wait_seconds)
    _held[key] = handle
    try:
        yield folder
    finally:
        del _held[key]
        _let_go(folder, handle)
        _remove_empty(missing)


@contextmanager
def lock_file(file: Path, path: Path) -> Iterator[None]:
    """Claims a folder by a lock inside of it, for a folder that is filled in place; the file goes at the end.

    Raises:
        OutputError: Another process holds it, or it cannot be made.
    """
    with _refusals(path):
        handle = _locked_file(file, path, 0.0)
    try:
        yield
    finally:
        remove_and_close(handle, file)


def holder(file: Path) -> str | None:
    """Returns who has signed a lock and lives, in words; None where nobody does. The lock is left alone."""
    try:
        owner = _owner_in(file.read_bytes()[:_MARK_BYTES]) if file.is_file() else None
    except OSError:
        return None
    return _named(owner) if owner is not None and _lives(owner) else None


@contextmanager
def left_over(folder: Path) -> Iterator[bool]:
    """Holds a work folder that is there, to clear it up; gives False where its owner lives."""
    try:
        handle = _locked(folder, folder, 0.0)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        _let_go(folder, handle)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into one line."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        where = f" ({shown(error.filename)})" if error.filename is not None else ""
        raise OutputError(f"cannot write '{shown(path)}': {error.strerror}{where}; choose another `output`") from None


def remove(path: Path) -> None:
    """Removes a file or a folder of ours; never follows a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(folder: Path, path: Path, wait_seconds: float) -> int:
    """Makes a work folder and locks it; returns the open mark."""
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        raise OutputError(f"'{shown(folder)}' is in the way and not regraft's; move it elsewhere or choose another `output`")
    while True:
        folder.mkdir(exist_ok=True)
        entries = os.listdir(folder)
        if entries and MARK not in entries:
            raise OutputError(f"'{shown(folder)}' is in the way and not regraft's; move it elsewhere or choose another `output`")
        try:
            return _locked_file(folder / MARK, path, wait_seconds)
        except FileNotFoundError:  # its last owner removed it between the two lines above
            continue
        except OSError:
            with suppress(OSError):
                folder.rmdir()  # which found no room for its mark, and is empty
            raise


def _locked_file(file: Path, path: Path, wait_seconds: float) -> int:
    deadline = time.monotonic() + wait_seconds
    while True:
        handle = os.open(file, MARK_FLAGS, 0o666)
        try:
            owner = _try_lock(handle, file)
        except BaseException:
            os.close(handle)
            raise
        if owner is None:
            return handle
        os.close(handle)
        if owner == "again":
            continue
        if time.monotonic() >= deadline:
            raise OutputError(f"'{shown(path)}' is in use by {owner}; wait for it or choose another `output`")
        time.sleep(_AGAIN_SECONDS)


def _try_lock(handle: int, file: Path) -> str | None:
    """Locks an open file and signs it; returns None, or who holds it, or "again" when the file went meanwhile."""
    content = read_start(handle, _MARK_BYTES)
    try:
        lock(handle)
    except BlockingIOError:
        return _named(_owner_in(content))
    except OSError:  # a file system without locks: what is written in the file has to do
        owner = _owner_in(content)
        if owner and _lives(owner):
            return _named(owner)
    try:
        if not os.path.samestat(os.stat(file), os.fstat(handle)):
            return "again"
    except FileNotFoundError:
        return "again"
    content = read_start(handle, _MARK_BYTES)
    if not stat.S_ISREG(os.fstat(handle).st_mode) or (content and _owner_in(content) is None):
        raise OutputError(f"'{shown(file)}' is in the way and not regraft's; move it elsewhere or choose another `output`")
    try:
        write_start(handle, _signature())
    except OSError:
        if not content:  # made for this claim, which is none
            with suppress(OSError):
                file.unlink()
                file.parent.rmdir()
        raise
    return None


def _signature() -> bytes:
    owner = {
        "what": _FORMAT,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return (json.dumps(owner) + "\n").encode()


def _started(process: int) -> float:
    """Returns when a process began: on Linux in ticks since the machine started, which a clock that is set anew does not change.

    Raises:
        psutil.Error: There is no such process.
    """
    try:
        return float(Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        import psutil  # at use, for the command line's sake: it is slow to load

        return psutil.Process(process).create_time()


def _owner_in(content: bytes) -> dict[str, Any] | None:
    """Returns who signed a mark; None where it is not a mark of ours."""
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) and owner.get("what") == _FORMAT else None


def _named(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return shown(f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}")


def _lives(owner: dict[str, Any]) -> bool:
    """Returns whether an owner is still there; of other machines nobody can tell, so they count as alive."""
    if owner.get("host") != socket.gethostname():
        return True
    import psutil  # at use, for the command line's sake: it is slow to load

    try:
        return _started(int(owner["process"])) == owner["started"]
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _let_go(folder: Path, handle: int) -> None:
    """Drops a lock; the work folder goes with it, unless something is left in it."""
    try:
        alone = os.listdir(folder) == [MARK]
    except OSError:  # the disk is gone
        alone = False
    if not alone:
        os.close(handle)
        return
    with suppress(OSError):  # somebody else has claimed it already: then it is not ours to remove
        remove_and_close(handle, folder / MARK)
        folder.rmdir()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
