"""Files and folders that are either whole or absent.

Everything is written aside, flushed to the disk and then renamed, so that a crash, a full disk or ``kill -9`` leaves what was there
before. The aside name starts with a dot and ends with ``.partial``; a later attempt clears it away.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from regraft.errors import OutputError


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot flush a folder; the rename is atomic there all the same
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Refuses an output that exists and is not an empty folder.

    Raises:
        OutputError: It exists.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise OutputError(f"output '{path}' exists; choose another --output or remove it first")


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, keep: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """Gives an empty folder beside ``path`` and renames it to ``path`` when the block ends well.

    Args:
        path: The final folder. Missing parents are made.
        replace: Whether an existing folder is replaced (it stays whole until the new one is).
        keep: Told what an interrupted attempt left aside, and what this one leaves when it fails: whether it is worth going on from.
            Then it is kept, and given in place of an empty folder.

    Yields:
        The folder to write into.

    Raises:
        OutputError: ``path`` exists and ``replace`` is off, or it cannot be written (a full disk, no permission). What was at
            ``path`` before is untouched and nothing half-written stays.
    """
    path = path.absolute()
    if not replace:
        refuse_existing(path)
    partial, retired = _partial(path), _retired(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(retired)
        if not (partial.is_dir() and keep(partial)):
            _remove(partial)
            partial.mkdir()
        yield partial
        readable = partial.stat().st_mode & 0o666  # as new files are here; safetensors makes its own for the owner alone
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                file.chmod(readable)
            _sync(file)
        _sync(partial)
        if path.exists():
            path.rename(retired)
        partial.rename(path)
        _sync(path.parent)
        _remove(retired)
    except BaseException as error:
        if retired.exists() and not path.exists():
            retired.rename(path)
        if not keep(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise _explained(error, path) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a file name beside ``path`` and renames it to ``path`` when the block ends well; replaces what is there.

    Raises:
        OutputError: It cannot be written; what was at ``path`` before is untouched.
    """
    path = path.absolute()
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise _explained(error, path) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is either whole or as it was before."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error, or what caused it, is a full disk or an exceeded quota.

    safetensors and tokenizers write in Rust and report it in the text of an error of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(seen) for sign in ("No space left on device", "os error 28", "os error 27", "os error 122", "File too large")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _explained(error: BaseException, path: Path) -> BaseException:
    """Turns the operating system's refusals into one line with a remedy; leaves everything else alone."""
    if isinstance(error, OutputError):
        return error
    if is_disk_full(error):
        return OutputError(f"the disk is full while writing '{path}'; nothing was changed: free some space or choose another --output")
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | FileNotFoundError) and error.filename is not None:
        return OutputError(f"cannot write '{path}': {error.strerror} ({error.filename}); choose another --output")
    return error
