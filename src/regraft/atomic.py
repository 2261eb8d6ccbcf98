"""Files and folders that are either whole or absent, and that never take the place of somebody else's.

Everything is written aside, flushed to the disk and then renamed, so that a crash, a full disk or ``kill -9`` leaves what was there
before. Where it is written aside, and who may, is the business of :mod:`regraft.claims`.

One rule says what may be an output: resolved, with all links and ``..`` gone, it is new, or an empty folder, or something that carries
our own manifest. When such a folder is replaced, only what its
manifest lists is removed, and what is the same in the new one; whatever else is found there is put beside it as ``NAME.before``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from regraft.claims import MARK, SUFFIX, claimed, in_work_folder, is_work_folder, left_over, remove, resolved, work_folder
from regraft.errors import OutputError, shown
from regraft.platforms import open_to_flush
from regraft.reading import object_in, read_object

MANIFEST = "manifest.json"
_ELSEWHERE = "choose another `output`"
_FILE_WAIT_SECONDS = 20.0  # a file is written in much less; whoever is second writes after the first


def _sync(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    handle = open_to_flush(path)
    if handle is None:
        return
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot flush a folder; the rename is atomic there all the same
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def refuse_existing(path: Path, *, in_place: bool = False) -> None:
    """Refuses an output that is neither new nor an empty folder, or that cannot be written; nothing is made.

    The mark beside a whole output, whose process was killed after its last rename, goes.

    Args:
        path: The output.
        in_place: Whether an empty folder is filled as it is, and not replaced by another.

    Raises:
        OutputError: The message says which.
    """
    name = shown(path)
    final = resolved(path)
    _refuse_unwritable(final, name)
    if path.is_symlink() and not final.is_dir():
        raise OutputError(f"output '{name}' exists; {_ELSEWHERE} or remove it first (it is a link)")
    if not os.path.lexists(final):
        return
    if not final.is_dir() or any(final.iterdir()):
        _clear_mark(final)
        raise OutputError(f"output '{name}' exists; {_ELSEWHERE} or remove it first")
    if not in_place and (os.path.ismount(final) or final == Path.cwd()):
        what = "a mount point" if os.path.ismount(final) else "the current folder"
        raise OutputError(f"output '{name}' is {what}, which cannot be put in place as a whole; name a folder in it")


def _clear_mark(path: Path) -> None:
    """Removes the work folder of an output where nothing but its mark is left in it and its owner is dead."""
    if not path.name:  # the root of a file system
        return
    work = work_folder(path)
    if is_work_folder(work) and os.listdir(work) == [MARK]:
        with left_over(work):
            pass  # whoever lets go of an empty work folder removes it


@contextmanager
def reserved(path: Path | None) -> Iterator[None]:
    """Claims an output folder before anything is computed for it, while the block runs.

    Args:
        path: Folder that :func:`atomic_folder` writes within the block; None for no output.

    Raises:
        OutputError: It exists or cannot be written, or another process is writing it.
    """
    if path is None:
        yield
        return
    refuse_existing(path)
    with claimed(path):
        refuse_existing(path)  # another process may have finished it while this one waited for the lock
        yield


@contextmanager
def reserved_file(path: Path | None, ours: Callable[[bytes], bool] = lambda content: False) -> Iterator[None]:
    """Claims an output file before anything is computed for it, while the block runs.

    Args:
        path: File that :func:`write_text` writes within the block; None for no output.
        ours: Test for a file of ours, as in :func:`refuse_foreign`; without it an existing file is refused unless it is empty.

    Raises:
        OutputError: It holds something else, or cannot be written, or another process is writing it.
    """
    if path is None:
        yield
        return
    refuse_foreign(path, ours)
    with claimed(path):
        refuse_foreign(path, ours)
        yield


def json_with(*names: str) -> Callable[[bytes], bool]:
    """Returns what tells a JSON file of ours, an object with these keys, from any other file."""

    def ours(content: bytes) -> bool:
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return set(names) <= set(object_in(value))

    return ours


def refuse_special(path: Path) -> None:
    """Refuses an output file that is a link, a folder, or a device or pipe, or that cannot be written; an ordinary file may be there.

    Raises:
        OutputError: The message says which.
    """
    name, whole = shown(path), resolved(path)
    _refuse_unwritable(resolved(path.parent) / path.name if path.name != ".." else whole, name)
    if path.is_symlink():
        raise OutputError(f"'{name}' is a link; give the file that it leads to, or another name")
    if path.is_dir() or path.name in ("", ".."):
        raise OutputError(f"'{name}' is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"'{name}' is a device or a pipe, no file; give the name of a file")


def refuse_foreign(path: Path, ours: Callable[[bytes], bool]) -> None:
    """Refuses an output file that somebody else has written.

    Args:
        path: A file that may be there.
        ours: Called with the file's bytes; returns whether regraft wrote them.

    Raises:
        OutputError: It is not ours, or cannot be written.
    """
    refuse_special(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"'{shown(path)}' cannot be read: {error.strerror}; give another name") from None
    if content and not ours(content):
        raise OutputError(f"output '{shown(path)}' exists; {_ELSEWHERE} or remove it first")


def _refuse_unwritable(final: Path, name: str) -> None:
    """Refuses a path whose name is too long, or whose first folder that is there cannot be written."""
    try:
        os.lstat(final)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write '{name}': {getattr(error, 'strerror', None) or error}; {_ELSEWHERE}") from None
    for parent in final.parents:
        if os.path.lexists(parent):
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise OutputError(f"cannot write '{name}': '{shown(parent)}' is not a folder that can be written; {_ELSEWHERE}")
            return


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False, keep: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """Gives an empty folder and renames it to ``path`` when the block ends well; no other process can write ``path`` meanwhile.

    Args:
        path: The final folder. Missing parents are made.
        replace: Whether an existing folder is replaced (it stays whole until the new one is).
        keep: Called with the partial folder of an interrupted attempt, and with this one's if it fails; returns whether a later attempt can
            continue from it. Then it is kept, and given in place of an empty folder.

    Yields:
        The folder to write into.

    Raises:
        OutputError: ``path`` exists and ``replace`` is off, another process writes it, or it cannot be written (a full disk, no
            permission). What was at ``path`` before is untouched and nothing half-written stays.
    """
    if not (replace and path.is_dir() and not path.is_symlink()):
        refuse_existing(path)
    path = resolved(path)
    with claimed(path) as work, _explaining(path):
        new, old = work / "new", work / "old"
        _finish(path, old)
        if not replace:
            refuse_existing(path)  # another process may have been writing it
        if not (new.is_dir() and keep(new)):
            remove(new)
            new.mkdir()
        try:
            yield new
            _flush(new)
            if path.is_dir() and any(path.iterdir()):
                path.rename(old)
            new.rename(path)
            try:
                _sync(path.parent)
            except OSError:
                path.rename(new)  # the name may not outlive a loss of power
                raise
            _finish(path, old)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            if not keep(new):
                shutil.rmtree(new, ignore_errors=True)
            raise


def _flush(new: Path) -> None:
    """Flushes a folder and all in it to the disk, and gives its files the rights that new files have here."""
    readable = new.stat().st_mode & 0o666  # safetensors makes files for the owner alone
    for file in sorted(new.rglob("*")):
        if file.is_file() and not file.is_symlink():
            file.chmod(readable)
            _sync(file)
        elif file.is_dir():
            _sync(file)
    _sync(new)


def _finish(path: Path, old: Path) -> None:
    """Ends what was begun with what was at ``path`` before: put back where there is no other, else cleared of what was ours."""
    if not old.exists():
        return
    if not path.exists():  # killed between the two renames
        old.rename(path)
        return
    if in_work_folder(path):
        remove(old)
        return
    listed = {MANIFEST, *_listed(old)}
    for file in sorted(old.rglob("*"), reverse=True):  # what is in a folder before the folder
        name = file.relative_to(old).as_posix()
        if file.is_dir() and not file.is_symlink():
            if not any(file.iterdir()):
                file.rmdir()
        elif name in listed or _same(file, path / name):
            file.unlink()
    if not any(old.iterdir()):
        old.rmdir()
    else:
        old.rename(_before(path))


def sweep(folder: Path) -> None:
    """Ends what killed processes left half written directly in a folder; what is kept to go on from stays."""
    for entry in sorted(folder.glob(f".*{SUFFIX}")):
        if is_work_folder(entry):
            with left_over(entry) as held:
                if held:
                    remove(entry / "new")
                    _finish(folder / entry.name.removeprefix(".").removesuffix(SUFFIX), entry / "old")


def _before(path: Path) -> Path:
    """Returns a free name next to a folder, for earlier contents that were not ours."""
    names = (path.with_name(f"{path.name}.before{number or ''}") for number in range(10**6))
    return next(name for name in names if not os.path.lexists(name))


def _listed(folder: Path) -> Iterable[str]:
    """Returns the names that a folder's manifest lists; none where it cannot be read."""
    try:
        files = read_object(folder / MANIFEST, OutputError).get("files")
    except OutputError:
        return []
    return [str(name) for name in object_in(files)]


def _same(one: Path, other: Path) -> bool:
    """Returns whether two ordinary files hold the same bytes."""
    ordinary = all(file.is_file() and not file.is_symlink() for file in (one, other))
    return ordinary and one.stat().st_size == other.stat().st_size and sha256_of(one) == sha256_of(other)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a file name aside and renames it to ``path`` when the block ends well; an ordinary file that is there is replaced.

    Whether that file may be replaced is for the caller to know (:func:`refuse_foreign`); a second process waits for the first.

    Raises:
        OutputError: It cannot be written, or is a link, a folder or a device; what was at ``path`` before is untouched.
    """
    refuse_special(path)
    path = resolved(path)
    with claimed(path, wait_seconds=_FILE_WAIT_SECONDS) as work, _explaining(path):
        new = work / "new"
        remove(new)
        try:
            yield new
            _sync(new)
            new.replace(path)
            try:
                _sync(path.parent)
            except OSError as error:
                if not is_disk_full(error):  # both files are whole, whichever of them the name leads to after a loss of power
                    raise
        finally:
            remove(new)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is either whole or as it was before."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: It is not there or cannot be read, or is a pipe or a device, which may have no end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is a folder, a pipe or a device, no file", str(path))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error, or what caused it, is a full disk or an exceeded quota.

    safetensors and tokenizers write in Rust and report it in the text of an error of their own.
    """
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and not any(seen is before for before in chain):
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(seen) for sign in ("No space left on device", "os error 28", "os error 27", "os error 122", "File too large")):
            return True
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write an output into one line with a remedy; leaves everything else alone."""
    try:
        yield
    except Exception as error:
        explained = _explained(error, path)
        if explained is None:
            raise
        raise explained from error


def _explained(error: Exception, path: Path) -> OutputError | None:
    if isinstance(error, OutputError):
        return None
    name = shown(path)
    if is_disk_full(error):
        return OutputError(f"the disk is full while writing '{name}'; nothing was changed: free some space or {_ELSEWHERE}")
    if isinstance(error, OSError) and error.filename is not None and _lies_beside(error.filename, path):
        return OutputError(f"cannot write '{name}': {error.strerror} ({shown(error.filename)}); {_ELSEWHERE}")
    return None


def _lies_beside(filename: object, path: Path) -> bool:
    """Returns whether what an error is about is the output, or lies in it or in its work folder."""
    if not isinstance(filename, str | bytes | os.PathLike):
        return False
    name = Path(os.fsdecode(filename))
    return bool({path, work_folder(path)} & {name, *name.parents}) or name == path.parent
