"""Fresh processes that begin at once: forked from a server that has imported torch, transformers and PEFT, and nothing of ours.

A command of regraft imports for ten seconds of processor time before it does anything, and most of that is other people's code. What is
started here has that behind it, and imports regraft anew: nothing that a test has patched or loaded is in it. It has its own file of the
standard output and error, environment, current folder and signals, as a process that a shell has started. Three things differ, so that
tests of them start real processes: what is read when Python, torch or huggingface_hub begin (``PYTHONHASHSEED``, ``OMP_NUM_THREADS``,
``HF_HOME``), which modules are imported, and how much memory the process has.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

PRELOADED = """
accelerate annotated_types optuna peft psutil pydantic.main rich.status safetensors.torch safetensors.numpy scipy.optimize scipy.stats
sklearn.linear_model sqlalchemy tokenizers torch torch.export transformers transformers.trainer typer yaml
transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama
"""


class Process:
    """A process that a server has forked; what :class:`subprocess.Popen` calls by these names, with the outputs as text."""

    def __init__(
        self, arguments: list[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, outputs: tuple[int, int] | None = None
    ) -> None:
        """Begins.

        Args:
            arguments: What ``python`` would be given: ``-c`` and code, ``-m`` and a module, or a file; then arguments.
            env: The whole environment; None for that of this process.
            cwd: The current folder; None for that of this process.
            outputs: Open files for standard output and error; None for pipes.
        """
        self.arguments, self.returncode = arguments, None
        request = {"arguments": arguments, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
        ends = [] if outputs else [os.pipe(), os.pipe()]
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._line.connect(_server())
        text = json.dumps(request).encode()
        fds = array.array("i", outputs or [write for _, write in ends])
        self._line.sendmsg([len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        self._line.sendall(text)
        for _, write in ends:
            os.close(write)
        self._pipes = [os.fdopen(read, encoding="utf-8") for read, _ in ends]
        self._answers = self._line.makefile("r")
        self.pid = int(self._answers.readline())

    @property
    def stdout(self) -> TextIO:
        return self._pipes[0]

    def poll(self) -> int | None:
        """Returns the exit status if the process has ended, and None otherwise."""
        if self.returncode is None:
            self._line.settimeout(0.001)
            try:
                self._line.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                return None
            self._line.settimeout(None)
            return self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit status: minus the number of the signal that ended it."""
        limit = time.monotonic() + timeout if timeout is not None else None
        while limit is not None and self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(self.arguments, float(timeout or 0))
            time.sleep(0.01)
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Reads both outputs to their ends, waits, and returns them."""
        with ThreadPoolExecutor(2) as readers:
            found = [readers.submit(pipe.read) for pipe in self._pipes]
            self.wait(timeout)
        for pipe in self._pipes:
            pipe.close()
        out, errors = (text.result() for text in found)
        return out, errors


def run(arguments: list[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a fresh process to its end; the arguments are those of :class:`Process`."""
    process = Process(arguments, env, cwd)
    out, errors = process.communicate()
    return subprocess.CompletedProcess(arguments, process.wait(), out, errors)


@cache
def _server() -> str:
    """Starts the server of this process, which ends with it, and returns the address of its socket."""
    folder = tempfile.mkdtemp(prefix="regraft-fresh-")
    address = f"{folder}/socket"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": f"{folder}/hf"}
    server = subprocess.Popen(
        [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", "the server of fresh processes did not begin"
    atexit.register(_end, server, folder)
    return address


def _end(server: subprocess.Popen[str], folder: str) -> None:
    server.communicate()
    shutil.rmtree(folder, ignore_errors=True)


def serve(address: str) -> None:
    """Forks a process for each request, until whoever started this one ends."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in threads if name != "jemalloc_bg_thd"]  # that of pyarrow, which is made to be forked
    assert len(others) == 1, f"a process with threads cannot be forked: {threads}"
    assert not [name for name in sys.modules if name.startswith("regraft")]
    gc.collect()
    gc.freeze()  # what is here is nobody's garbage: a search for some would copy all of its pages
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(address)
        door.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([door, sys.stdin], [], [])
            if sys.stdin in ready:
                with suppress(ChildProcessError):
                    while os.waitpid(-1, 0):
                        pass
                os._exit(0)
            line, _ = door.accept()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass  # a watcher that has ended
            if os.fork() == 0:
                break
            line.close()
    _become(_watch(line))


def _watch(line: socket.socket) -> dict[str, Any]:
    """Forks once more and reports on that process; returns in it, with the outputs in their places."""
    size, ancillary, _, _ = line.recvmsg(8, socket.CMSG_SPACE(2 * array.array("i").itemsize))
    fds = array.array("i", ancillary[0][2])
    length, text = int.from_bytes(size, "big"), b""
    while len(text) < length:
        text += line.recv(length - len(text))
    child = os.fork()
    if child:
        for fd in fds:
            os.close(fd)
        line.sendall(f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    line.close()
    with open(os.devnull) as nothing:
        for source, target in ((nothing.fileno(), 0), (fds[0], 1), (fds[1], 2)):
            os.dup2(source, target)
    for fd in fds:
        os.close(fd)
    return json.loads(text)


def _become(request: dict[str, Any]) -> NoReturn:
    """Takes environment, folder, path and signals of a request, runs its code as the main program, and ends."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1 if os.environ.get("PYTHONUNBUFFERED") else -1)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    what = request["arguments"][0]
    own = request["cwd"] if what in ("-c", "-m") else str(Path(what).parent)
    first = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [own, *first, *sys.path[1:]]  # the first was the folder of this file
    code = 1
    try:
        _run_main(request["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    # As Python ends, but for the clearing of all modules, which takes longer than most of what is run here.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _run_main(arguments: list[str]) -> None:
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
