"""What differs between operating systems, in one place: locks, flushing, open files, and the memory that was taken.

Linux is what the tests run on. A test imports every module as Windows would, without what only POSIX has, and locks by a stand-in.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

WINDOWS = sys.platform == "win32"
# How a file is opened whose lock says that somebody works here: never through a link, and not for child processes.
MARK_FLAGS = os.O_RDWR | os.O_CREAT | (os.O_BINARY | os.O_NOINHERIT if sys.platform == "win32" else os.O_NOFOLLOW | os.O_CLOEXEC)
# Exit code of a process that its timer of processor time has ended; None where there are no such timers.
OUT_OF_TIME = None if sys.platform == "win32" else -signal.SIGPROF

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30  # far behind what is in the file: what is locked cannot be read there

    def lock(handle: int) -> None:
        """Locks an open file for this process, until it is closed or the process ends.

        Raises:
            BlockingIOError: Another process has locked it.
            OSError: The file system has no locks.
        """
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from None

    def peak_memory_bytes() -> int:
        """Returns the most memory that this process has held."""
        import psutil

        return psutil.Process().memory_info().peak_wset

    def is_alive(parent: int) -> bool:
        """Returns whether the process that has started this one is there; its number alone would still be given after its end."""
        import psutil

        return psutil.pid_exists(parent)

else:
    import fcntl
    import resource

    def lock(handle: int) -> None:
        """Locks an open file for this process, until it is closed or the process ends.

        Raises:
            BlockingIOError: Another process has locked it.
            OSError: The file system has no locks.
        """
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def peak_memory_bytes() -> int:
        """Returns the most memory that this process has held."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def is_alive(parent: int) -> bool:
        """Returns whether the process that has started this one is there."""
        return os.getppid() == parent


def read_start(handle: int, most_bytes: int) -> bytes:
    """Returns the first bytes of an open file."""
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, most_bytes)


def write_start(handle: int, content: bytes) -> None:
    """Makes an open file hold these bytes alone."""
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, content)


def remove_and_close(handle: int, file: Path) -> None:
    """Removes a locked file and gives up its lock: in this order, so that nobody locks what goes; Windows removes no open file.

    Raises:
        OSError: The file cannot be removed; it is closed all the same.
    """
    if WINDOWS:
        os.close(handle)
        file.unlink(missing_ok=True)  # refused while another process has it open, whose it is then
        return
    try:
        file.unlink(missing_ok=True)
    finally:
        os.close(handle)


def let_go(handle: int, start: int, length: int) -> None:
    """Starts writing a part of an open file to the disk, and takes what is on the disk already out of memory; Linux alone has this."""
    if sys.platform == "linux":
        with suppress(OSError):  # some file systems have no such call
            os.posix_fadvise(handle, start, length, os.POSIX_FADV_DONTNEED)


def open_to_flush(path: Path) -> int | None:
    """Returns a file or a folder's list of names, open so that :func:`os.fsync` takes it; None where the system flushes no folders."""
    if not WINDOWS:
        return os.open(path, os.O_RDONLY)
    return None if path.is_dir() else os.open(path, os.O_RDWR)
