"""Jobs: commands of regraft that the studio has started, each a process of its own with its output in files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from regraft.errors import InputError
from regraft.progress import EVERY

# -P: a file of the current folder is not taken for a module.
COMMAND = (sys.executable, "-P", "-m", "regraft")
EVERY_SECONDS = "2"
LONGEST_ANSWER_BYTES = 1 << 16
_LAST_BYTES = 4096
_END_SECONDS = 3.0  # less than signals.GRACE_SECONDS, after which the process itself is ended


@dataclass
class Job:
    """A command that runs or has run.

    Attributes:
        number: Its number, from 1 in the order of starting.
        title: What it is, for people: the name of a run, or of a model.
        arguments: What stands behind ``regraft`` on the command line.
        folder: Folder of its output: ``out`` and ``err``.
        process: Its process.
        started: When it began, of the monotonic clock.
        stopped: Whether it was asked to stop.
        seconds: How long it took; None while it runs.
    """

    number: int
    title: str
    arguments: tuple[str, ...]
    folder: Path
    process: subprocess.Popen[bytes]
    started: float
    stopped: bool = False
    seconds: float | None = None

    @property
    def state(self) -> str:
        """``running``, ``done``, ``stopped`` or ``failed``."""
        code = self.process.poll()
        if code is None:
            return "running"
        if self.seconds is None:
            self.seconds = time.monotonic() - self.started
        return "done" if code == 0 else "stopped" if self.stopped else "failed"

    def as_dict(self) -> dict[str, Any]:
        """Returns what the page shows of it, as plain JSON types."""
        state = self.state
        seconds = time.monotonic() - self.started if self.seconds is None else self.seconds
        return {
            "number": self.number,
            "title": self.title,
            "kind": self.arguments[0],
            "arguments": list(self.arguments),
            "state": state,
            "code": self.process.returncode,
            "seconds": round(seconds, 1),
            "line": self._last_line(),
        }

    def output(self, start: int) -> tuple[str, int]:
        """Returns what it has printed from a byte on, and the byte to go on from; half a character at the end waits for its other half."""
        with (self.folder / "out").open("rb") as stream:
            stream.seek(start)
            content = stream.read(LONGEST_ANSWER_BYTES)
        if self.process.poll() is None or len(content) == LONGEST_ANSWER_BYTES:
            content = content[: _whole(content)]
        return content.decode("utf-8", "replace"), start + len(content)

    def stop(self) -> None:
        """Asks it to end, as Ctrl-C does; it ends within five seconds and leaves nothing half-written."""
        if self.process.poll() is None:
            self.stopped = True
            self.process.terminate()

    def _last_line(self) -> str:
        """Returns the last line on its standard error: its progress while it runs, its error at the end."""
        with (self.folder / "err").open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _LAST_BYTES))
            lines = stream.read().decode("utf-8", "replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")


def _whole(content: bytes) -> int:
    """Returns how many bytes end with a whole UTF-8 character.

    >>> _whole("aé".encode()), _whole("aé".encode()[:-1])
    (3, 1)
    """
    for back in range(1, min(4, len(content)) + 1):
        first = content[-back]
        if first & 0b1100_0000 != 0b1000_0000:  # the first byte of a character
            wanted = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return len(content) - back if wanted > back else len(content)
    return len(content)


class Jobs:
    """All jobs of a studio.

    Args:
        folder: An empty folder for what they print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: list[Job] = []

    def start(self, title: str, arguments: Sequence[str], given: str = "") -> Job:
        """Starts a command.

        Args:
            title: What it is, for people.
            arguments: What stands behind ``regraft``.
            given: Its standard input.
        """
        folder = self._folder / str(len(self._jobs) + 1)
        folder.mkdir()
        (folder / "in").write_text(given, encoding="utf-8")
        with (folder / "in").open("rb") as source, (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = _started(arguments, source, out, err)
        job = Job(len(self._jobs) + 1, title, tuple(arguments), folder, process, time.monotonic())
        self._jobs.append(job)
        return job

    def all(self) -> list[Job]:
        """Returns the jobs, the newest first."""
        return list(reversed(self._jobs))

    def numbered(self, number: str) -> Job:
        """Returns the job of a number.

        Raises:
            InputError: There is none.
        """
        for job in self._jobs:
            if str(job.number) == number:
                return job
        raise InputError(f"there is no job '{number}'; there are {len(self._jobs)}")

    def stop_all(self) -> list[Job]:
        """Stops what runs, waits for it a few seconds, and returns it."""
        running = [job for job in self._jobs if job.state == "running"]
        for job in running:
            job.stop()
        deadline = time.monotonic() + _END_SECONDS
        while any(job.state == "running" for job in running) and time.monotonic() < deadline:
            time.sleep(0.05)
        return running


def _started(arguments: Sequence[str], source: BinaryIO, out: BinaryIO, err: BinaryIO) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "NO_COLOR": "1", "COLUMNS": "100", EVERY: EVERY_SECONDS}
    # A session of its own: Ctrl-C reaches the studio, which stops it.
    return subprocess.Popen([*COMMAND, *arguments], stdin=source, stdout=out, stderr=err, env=environment, start_new_session=True)
