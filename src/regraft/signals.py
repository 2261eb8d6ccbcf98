"""Signals: a command ends within seconds of Ctrl-C, SIGTERM or SIGHUP, with its children, whatever it is doing.

A signal becomes an exception in the main thread, so that what is half-written is cleared up. Where that takes too long, since a
library computes without looking up, a thread that sleeps until then ends the process. Nothing here is imported but the standard
library, and what needs no more than it: it is in place before the rest is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from regraft.platforms import WINDOWS, is_alive

GRACE_SECONDS = 3.5
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_SET_DEATH_SIGNAL = 1  # of Linux's prctl
_POLL_SECONDS = 0.5


_came: list[int] = []  # the signals that came, in order
_through: list[bool] = []  # not empty when the command is through


def exit_code() -> int:
    """Returns the exit code of an interrupted command: 128 and the number of the signal, as shells have it."""
    return 128 + (_came[0] if _came else signal.SIGINT)


def install() -> None:
    """Turns signals into exceptions, for the process of a command; those that are ignored, as by ``nohup``, stay ignored."""
    receiver, sender = os.pipe()
    if not WINDOWS:  # where pipes have no such mode before Python 3.12, and none is needed
        os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)
    threading.Thread(target=_watch, args=(receiver,), name="regraft-signals", daemon=True).start()


def has_come() -> bool:
    """Returns whether a signal has come to this process since :func:`install`."""
    return bool(_came)


def close() -> None:
    """Lets signals interrupt no more: the command is through, and what is left to do at the exit takes moments."""
    _through.append(True)


def _raise(number: int, frame: FrameType | None) -> None:
    """Interrupts the main thread at the first signal; a second one would interrupt the clearing up, which has its time anyway."""
    _came.append(number)
    if len(_came) == 1 and not _through:
        raise KeyboardInterrupt


def _watch(receiver: int) -> None:
    """Waits for a signal, then for the main thread, and ends the process where that does not come to it."""
    while True:
        number = os.read(receiver, 1)[0]
        if number in SIGNALS and signal.getsignal(number) is _raise:
            time.sleep(GRACE_SECONDS)
            end_children()
            with contextlib.suppress(OSError):
                os.write(2, f"error: interrupted in the middle of a computation; {_rest()}\n".encode())
            os._exit(128 + number)


def _rest() -> str:
    """Returns how to go on after the command of this process."""
    if sys.argv[1:2] and sys.argv[1] in ("run", "recover", "allocate"):
        return "the same command with --resume goes on from what is finished"
    return "nothing half-written was left under its final name"


def end_children() -> None:
    """Kills the processes that this one has started, and theirs."""
    psutil = sys.modules.get("psutil")  # without it nothing has been started yet
    if psutil is None:
        return
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def die_with_parent(parent: int) -> None:
    """Ends this process as soon as its parent is gone, however that went; for processes that a command starts.

    Args:
        parent: The process that has started this one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # of systems without it; a thread looks too
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def watch() -> None:
        while is_alive(parent):
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="regraft-parent", daemon=True).start()
