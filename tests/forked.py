"""Commands of regraft in processes of their own that cost no start: one process imports everything, and each command is a fork of it.

So a command may hang, be killed at any moment, find its standard output full, or lose its rights, and hundreds of them take minutes.
Started as a program, this file is that process: it reads one JSON object a line, a list of commands to run at the same time, and
answers with one line.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

_DROPPED = (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what lets root read and write everything
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_FOLDERS_FOR_OTHERS = 0o022


@dataclass(frozen=True)
class Command:
    """A command line, and the circumstances it runs in.

    Attributes:
        folder: Current folder.
        arguments: What follows ``regraft``.
        code: A Python program in its place.
        environment: Variables that are set, or with None removed.
        setup: Names of functions of this module that are called in the new process first, as ``name`` or ``name:argument``.
        limit_s: After so many seconds the process is killed and counts as hanging.
        die_at: The number of the write, rename or flush at which it kills itself; 0 for never.
        full_at: The number of the step that needs room on the disk from which on none is left; 0 for never.
        kill_after_s: When it is killed from outside; None for never.
        delay_s: How long it waits at the beginning.
    """

    folder: str
    arguments: Sequence[str] = ()
    code: str = ""
    environment: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    setup: Sequence[str] = ()
    limit_s: float = 60.0
    die_at: int = 0
    full_at: int = 0
    kill_after_s: float | None = None
    delay_s: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (None where it was hanging and killed), what it printed, and its time.

    Attributes:
        writes: How often it changed files: the moments for ``die_at``.
        filled: How often it needed room on the disk: the moments for ``full_at``.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    writes: int
    filled: int = 0

    @property
    def lines(self) -> list[str]:
        """What was said on the standard error, without empty lines."""
        return [line for line in self.err.split("\n") if line.strip()]


class Forks:
    """The process that all commands are forks of; a context manager.

    Args:
        patience_s: No command is killed earlier, whatever its own limit: for a machine with much other work.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "REGRAFT_REPORT": "0"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *about: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30 + self._patience_s)
        self._server.stdout.close()

    def at_once(self, *commands: Command) -> list[Ended]:
        """Runs commands at the same time and returns how each ended."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        patient = [replace(command, limit_s=max(command.limit_s, self._patience_s)) for command in commands]
        self._server.stdin.write(json.dumps([asdict(command) for command in patient]) + "\n")
        self._server.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._server.stdout.readline())]

    def run(self, folder: Path, *arguments: str, **circumstances: Any) -> Ended:
        """Runs one command; keywords are those of :class:`Command`."""
        return self.at_once(Command(str(folder), arguments, **circumstances))[0]


def _serve() -> None:
    for request in sys.stdin:
        started = [_start(Command(**command)) for command in json.loads(request)]
        print(json.dumps([asdict(one) for one in _ended(started)]), flush=True)


@dataclass
class _Running:
    process: int
    command: Command
    began: float
    pipes: dict[int, bytearray]  # of the standard output, the standard error, and the count of writes
    code: int | None = None
    seconds: float = 0.0


def _start(command: Command) -> _Running:
    pipes = [os.pipe() for _ in range(3)]
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            os.dup2(pipes[0][1], 1)
            os.dup2(pipes[1][1], 2)
            os._exit(_child(command, pipes[2][1]) & 255)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(99)
    for _, inner in pipes:
        os.close(inner)
    return _Running(process, command, time.monotonic(), {outer: bytearray() for outer, _ in pipes})


def _ended(started: list[_Running]) -> list[Ended]:
    """Collects what the processes print until all have ended."""
    open_pipes = {pipe: one for one in started for pipe in one.pipes}
    alive = list(started)
    while alive or open_pipes:
        for pipe in select.select(list(open_pipes), [], [], 0.01)[0] if open_pipes else ():
            content = os.read(pipe, 1 << 16)
            open_pipes[pipe].pipes[pipe] += content
            if not content:
                os.close(pipe)
                del open_pipes[pipe]
        for one in list(alive):
            age = time.monotonic() - one.began
            wanted = one.command.kill_after_s
            if (wanted is not None and age > wanted) or age > one.command.limit_s:
                os.kill(one.process, signal.SIGKILL)
            process, status = os.waitpid(one.process, os.WNOHANG)
            if process:
                alive.remove(one)
                one.seconds = age
                one.code = os.waitstatus_to_exitcode(status)
                if age > one.command.limit_s:
                    one.code = None
    return [_summary(one) for one in started]


def _summary(one: _Running) -> Ended:
    out, err, writes = (bytes(content).decode("utf-8", "backslashreplace") for content in one.pipes.values())
    return Ended(one.code, out, err, one.seconds, writes.count("c") + writes.count("b"), writes.count("f") + writes.count("b"))


def _child(command: Command, writes: int) -> int:
    """Runs a command in the new process; returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    time.sleep(command.delay_s)
    os.chdir(command.folder)
    for name, value in command.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    for call in command.setup:
        name, _, argument = call.partition(":")
        SETUPS[name](argument)
    _count(writes, command)
    try:
        if command.code:
            code = _program(command.code)
        else:
            from regraft.cli.app import run

            code = run([os.fsdecode(argument.encode("utf-8", "surrogateescape")) for argument in command.arguments])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError):
        return 2
    return code


def _program(code: str) -> int:
    """Runs a Python program as the API's users do: our errors are caught, anything else is a traceback."""
    from regraft.errors import RegraftError

    try:
        exec(compile(code, "<case>", "exec"), {"__name__": "__case__"})
    except RegraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _count(pipe: int, command: Command) -> None:
    """Counts what changes files and what needs room on the disk; at ``die_at`` the process dies, from ``full_at`` on the disk is full.

    Renames, flushes, removals, new folders and what safetensors writes are changes. The disk is that of the command's folder; a full one
    refuses new files and folders, writing and flushing, but no renames and no removals.
    """
    import io

    import safetensors.torch

    changed, filled = 0, 0
    here = os.path.realpath(command.folder) + os.sep

    def counted(function: Callable[..., Any], *, changes: bool, fills: Callable[..., bool] = lambda *_, **__: False) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal changed, filled
            room = fills(*arguments, **keywords)
            changed, filled = changed + changes, filled + room
            if changes and changed == command.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(pipe, b"b" if changes and room else b"f" if room else b"c" if changes else b"")
            if room and 0 < command.full_at <= filled:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *(arguments[:1] if isinstance(arguments[0], str | Path) else ()))
            return function(*arguments, **keywords)

        return call

    def lies_here(path: Any, *_: Any, **__: Any) -> bool:
        return not isinstance(path, int) and (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(here)

    def opened(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set("wax+") & set(mode)) and lies_here(path)

    def made(path: Any, flags: int, *_: Any, **__: Any) -> bool:
        return bool(flags & os.O_CREAT) and lies_here(path)

    for name in ("rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name), changes=True))
    os.mkdir = counted(os.mkdir, changes=True, fills=lies_here)
    for name in ("fsync", "ftruncate"):
        setattr(os, name, counted(getattr(os, name), changes=True, fills=lambda *_: True))
    os.open = counted(os.open, changes=False, fills=made)
    io.open = builtins.open = counted(io.open, changes=False, fills=opened)
    library: Any = safetensors.torch
    library.serialize_file = counted(library.serialize_file, changes=True, fills=lambda _, path, *__, **___: lies_here(path))


def _without_rights(_: str) -> None:
    """Takes from root what other users do not have."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(header, data)
        for number in _DROPPED:
            data[0] &= ~(1 << number)
        assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def _mounted(options: str) -> None:
    """Mounts a file system in memory at ``mp`` that only this process sees; ``ro`` among the options makes it read-only afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    Path("mp").mkdir(exist_ok=True)
    if libc.unshare(_NEW_MOUNTS) != 0 or libc.mount(b"none", b"/", None, 0x4C000, None) != 0:
        raise OSError(ctypes.get_errno(), "no mounts here")
    size = options.partition(",")[0]
    if libc.mount(b"tmpfs", b"mp", b"tmpfs", 0, size.encode()) != 0:
        raise OSError(ctypes.get_errno(), "no mounts here")
    if "ro" in options.split(",") and libc.mount(b"tmpfs", b"mp", b"tmpfs", 0x21, None) != 0:
        raise OSError(ctypes.get_errno(), "no mounts here")


def _onto(which: str) -> None:
    """Puts a device that is always full, or nothing, or a pipe that nobody reads in place of a stream, as ``full:1`` says."""
    what, _, number = which.partition(" ")
    stream = int(number)
    if what == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
    elif what == "closed":
        os.close(stream)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, stream)


def _small_files(most_bytes: str) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most_bytes), int(most_bytes)))


def _little_memory(more_bytes: str) -> None:
    """Leaves the process so many bytes of addresses beyond those that it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(more_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _in_a_folder_that_is_gone(_: str) -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")


SETUPS: dict[str, Callable[[str], None]] = {
    "without_rights": _without_rights,
    "mounted": _mounted,
    "onto": _onto,
    "small_files": _small_files,
    "little_memory": _little_memory,
    "gone": _in_a_folder_that_is_gone,
}


def _import_everything() -> None:
    """Imports what commands import when they are called, so that no fork has to; computes nothing with gradients, which forbids forks."""
    import importlib

    import alembic.context  # noqa: F401
    import optuna.storages
    import optuna.storages._rdb.models  # noqa: F401
    import peft  # noqa: F401
    import psutil  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.mistral.modeling_mistral
    import transformers.trainer  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import regraft
    from regraft.cli.app import COMMANDS, build
    from regraft.importance import CRITERIA

    get_checkpoint_conversion_mapping("llama")  # compiles nine hundred patterns, which every load of a model would
    build()
    for name in CRITERIA.names():
        CRITERIA.get(name)

    for name in regraft.__all__:
        getattr(regraft, name)
    for name in COMMANDS:
        importlib.import_module(f"regraft.cli.{name}")


if __name__ == "__main__":
    os.umask(_FOLDERS_FOR_OTHERS)
    _import_everything()
    gc.collect()
    gc.freeze()  # what is here is nobody's garbage: a search for some in every fork would copy all of its pages
    _serve()
