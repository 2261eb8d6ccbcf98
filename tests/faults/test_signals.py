"""Signals to real processes: a command ends within seconds, with its workers, and says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import fresh
import tiny_inputs

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
MOST_SECONDS = 5.0
BEGINS_WITHIN_SECONDS = 120.0

# Both take minutes if nothing ends them.
PRUNE = [
    "prune",
    "model",
    "--output",
    "pruned",
    "--ratio",
    "0.3",
    "--criterion",
    "surgeon",
    "--calibration",
    "text.txt",
    "--samples",
    "20000",
    "--seq-len",
    "32",
    "--device",
    "cpu",
]
ALLOCATE = [
    "allocate",
    "model",
    "--output",
    "plan.json",
    "--resume",
    "--method",
    "rankadaptor",
    "--prior",
    "none",
    "--ranks",
    "1,2,4",
    "--budget",
    "r=2",
    "--trials",
    "16",
    "--workers",
    "2",
    "--data",
    "text.txt",
    "--steps",
    "4000",
    "--eval-every",
    "100",
    "--batch",
    "2",
    "--seq-len",
    "32",
    "--samples",
    "4",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a tiny model and a long text."""
    made = tmp_path_factory.mktemp("signals")
    before = Path.cwd()
    os.chdir(made)
    try:
        tiny_inputs.make_inputs()
    finally:
        os.chdir(before)
    (made / "text.txt").write_text("\n".join([tiny_inputs.TEXT] * 120), encoding="utf-8")
    return made


def _runs(process: psutil.Process) -> bool:
    """Returns whether a process is there; one that has ended and is not yet collected by whoever adopted it counts as gone."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _heeded() -> None:
    """Lets signals end the process that calls it: a shell starts what runs in the background with Ctrl-C ignored, and this is inherited."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)


class Command:
    """A command of regraft in a process of its own, whose errors go to a file.

    Args:
        folder: Its current folder, which gets the file.
        arguments: What follows ``regraft``.
        loads: Whether it has to load torch first, which takes seconds, as one that a shell starts.
    """

    def __init__(self, folder: Path, arguments: list[str], *, loads: bool = False) -> None:
        self.family: set[psutil.Process] = set()  # all processes that were seen below it
        self._errors = folder / "errors.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = ["-m", "regraft", *arguments]
        self.process: fresh.Process | subprocess.Popen[bytes]
        with self._errors.open("wb") as errors, open(os.devnull, "wb") as nothing:
            if loads:
                self.process = subprocess.Popen(
                    [sys.executable, *command], cwd=folder, env=environment, stdout=nothing, stderr=errors, preexec_fn=_heeded
                )
            else:
                self.process = fresh.Process(command, environment, folder, (nothing.fileno(), errors.fileno()))

    def wait_until(self, begun: Callable[[], bool]) -> None:
        limit = time.monotonic() + BEGINS_WITHIN_SECONDS
        while not begun():
            assert self.process.poll() is None, f"it ended by itself: {self.errors()}"
            assert time.monotonic() < limit, "it does not begin"
            time.sleep(0.05)

    def children(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.family.update(found)
        return found

    def seconds_to_end(self, number: signal.Signals) -> float:
        """Sends a signal and returns after how many seconds the process and all below it are gone."""
        self.children()
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(MOST_SECONDS * 4)
        while any(map(_runs, self.family)) and time.monotonic() < began + MOST_SECONDS * 4:
            time.sleep(0.02)
        return time.monotonic() - began

    def errors(self) -> str:
        return self._errors.read_text(encoding="utf-8")

    def said(self) -> list[str]:
        """Returns what was said last: the lines from the first that says error."""
        lines = [line for line in self.errors().splitlines() if line.strip()]
        first = next((index for index, line in enumerate(lines) if "error:" in line), len(lines))
        return lines[first:]


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(arguments: list[str], *, loads: bool = False) -> Command:
        started.append(Command(folder, arguments, loads=loads))
        return started[-1]

    yield start
    for command in started:
        for process in command.family:
            if process.is_running():
                process.kill()
        command.process.kill()
        command.process.wait()


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS)
def test_a_prune_ends(folder: Path, begin: Callable[..., Command], number: signal.Signals) -> None:
    loads = number == signal.SIGINT
    command = begin(PRUNE, loads=loads)
    command.wait_until((folder / ".pruned.regraft" / "owner.json").exists)
    time.sleep(0.2 if loads else 1.5)  # while it loads, and while it scores
    assert command.seconds_to_end(number) < MOST_SECONDS
    assert command.process.returncode == 128 + number
    assert command.said() == ["error: interrupted; nothing half-written was left under its final name"]
    assert not (folder / "pruned").exists()
    assert not (folder / ".pruned.regraft").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_search_ends_with_its_workers(folder: Path, begin: Callable[..., Command], number: signal.Signals) -> None:
    command = begin(ALLOCATE)
    command.wait_until(lambda: len(workers(command)) == 2)
    time.sleep(1.0 + 2.0 * NUMBERS.index(number))  # while they import, and while they measure
    assert command.seconds_to_end(number) < MOST_SECONDS
    assert command.process.returncode == 128 + number
    assert [line.replace(" in the middle of a computation", "") for line in command.said()] == [
        "error: interrupted; the same command with --resume goes on from what is finished"
    ]
    assert not (folder / "plan.json").exists()


def test_the_workers_of_a_search_that_is_killed_end_too(folder: Path, begin: Callable[..., Command]) -> None:
    command = begin(ALLOCATE)
    command.wait_until(lambda: len(workers(command)) == 2)
    time.sleep(2.0)
    assert command.seconds_to_end(signal.SIGKILL) < MOST_SECONDS
    assert not (folder / "plan.json").exists()


def workers(command: Command) -> list[psutil.Process]:
    """Returns the processes that measure, without that which multiprocessing starts to count resources."""
    found: list[psutil.Process] = []
    for process in command.children():
        try:
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


ODD_MOMENTS = {
    "again, while it clears up": (
        "try:\n send(SIGINT); time.sleep(5)\nexcept KeyboardInterrupt:\n send(SIGTERM); send(SIGINT); send(SIGHUP); time.sleep(0.1)\n"
        " print('cleared up')\nraise SystemExit(signals.exit_code())",
        128 + signal.SIGINT,
        "cleared up\n",
        "",
    ),
    "when it is through": ("signals.close(); send(SIGTERM); time.sleep(0.1); print('through')", 0, "through\n", ""),
    "where a library makes another error of it": (
        "def broken(name):\n try:\n  send(SIGHUP); time.sleep(5)\n except KeyboardInterrupt:\n  raise RuntimeError('lost') from None\n"
        "app.load_command = broken\nraise SystemExit(app.run(['recover', 'x']))",
        128 + signal.SIGHUP,
        "",
        "error: interrupted; the same command with --resume goes on from what is finished\n",
    ),
}


@pytest.mark.parametrize("moment", ODD_MOMENTS)
def test_a_signal_at_an_odd_moment(moment: str) -> None:
    code, returned, out, said = ODD_MOMENTS[moment]
    first = "import os, time\nfrom signal import *\nfrom regraft import signals\nfrom regraft.cli import app\nsignals.install()\n"
    done = fresh.run(["-c", f"{first}send = lambda number: os.kill(os.getpid(), number)\n{code}"])
    assert (done.returncode, done.stdout, done.stderr) == (returned, out, said)


def test_closed_streams_are_opened_before_a_file_takes_their_number() -> None:
    code = (
        "import os, sys; [os.close(n) for n in (0, 1)]; sys.stdin = sys.stdout = None;"
        "from regraft.__main__ import open_closed_streams; open_closed_streams();"
        "assert os.open(os.devnull, os.O_RDONLY) > 2; assert sys.stdin.read() == ''; print('x'); sys.stdout.flush()"
    )
    done = fresh.run(["-c", code])
    assert done.returncode == 0, done.stderr
