"""A command that is killed at many moments and given again: what each attempt left, beside what an undisturbed one leaves.

:func:`killed` is for tests. The rest runs in a process of its own, which forks for every attempt, since importing takes longer than
running. A child kills itself when it is about to make its n-th change of the file system (a rename, a new folder, a removal), or when a
timer rings.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fresh

CALLS = ("rename", "replace", "mkdir", "unlink", "rmdir")
CHANGES_WITH_TIME = ("timings.json", "search.db")
SHARD_BYTES = 20_000  # a tiny model streams into several shards


@dataclass(frozen=True)
class Attempt:
    """One command that was killed and given again.

    Attributes:
        plan: When it was to be killed.
        code: Exit code of the first attempt; -9 where it was killed.
        again: Exit code of the last attempt.
        different: Files at the end that differ from those of an undisturbed command.
        stopped: Names of all that lay there while it was stopped.
    """

    plan: str
    code: int
    again: int
    different: Sequence[str]
    stopped: Sequence[str]


def killed(command: Sequence[str], work: Path, *, moments: int, timers: int = 1, most_kills: int = 5) -> tuple[list[str], list[str]]:
    """Kills a command at drawn moments, gives it again, and checks that it ends with the bytes of an undisturbed one.

    Args:
        command: The words after ``regraft``; they run in an empty folder, so outputs are relative and inputs absolute.
        work: An empty folder.
        moments: How many changes of the file system are drawn, at each of which one command is killed.
        timers: How many commands are killed after a part of their time.
        most_kills: How often one command more is killed, again and again, before it gets through.

    Returns:
        The files of an undisturbed command, and the names of all that lay there while a command was stopped.
    """
    spec = {"command": list(command), "work": str(work), "moments": moments, "timers": timers, "most_kills": most_kills}
    done = fresh.run([__file__, json.dumps(spec)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.partition("REPORT ")[2])
    attempts = [Attempt(**attempt) for attempt in found["attempts"]]
    for attempt in attempts:
        assert attempt.again == 0, f"{attempt}\n{done.stderr[-3000:]}"
        assert attempt.different == [], attempt
    stopped = [attempt for attempt in attempts if attempt.code == -signal.SIGKILL]
    assert len(stopped) >= moments + 1, "too few were killed to prove anything"
    assert not [name for name in found["files"] if ".regraft" in name or ".before" in name]
    return found["files"], [name for attempt in stopped for name in attempt.stopped]


def _attempt(
    run: Callable[[], int], folder: Path, at_change: int | None = None, after_seconds: float | None = None
) -> tuple[int, int, float]:
    """Forks, runs the command in a folder, and returns its exit code, its changes of the file system, and its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        changes = _counting(at_change)
        if after_seconds is not None:
            threading.Timer(after_seconds, _die).start()
        started = time.monotonic()
        code = run()
        os.write(write, json.dumps([len(changes), time.monotonic() - started]).encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        told = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changed, seconds = json.loads(told) if told else (0, 0.0)
    return code, changed, seconds


def _counting(at_change: int | None) -> list[str]:
    """Notes every change of the file system from now on in a list, and dies before the one that is asked for."""
    changes: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            changes.append(name)
            if len(changes) == at_change:
                _die()
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))
    return changes


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in CHANGES_WITH_TIME]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def main(command: list[str], work: Path, moments: int, timers: int, most_kills: int) -> None:
    """Makes every attempt and prints the report."""
    import torch

    from regraft.cli import app
    from regraft.streaming import output

    importlib.import_module("regraft.pipelines.run.run")  # all that a command imports, once for all attempts
    torch.set_num_threads(1)
    output.SHARD_BYTES = SHARD_BYTES

    def run() -> int:
        return app.run(command)

    code, changes, seconds = _attempt(run, work / "calm")
    assert code == 0, code
    calm = _tree(work / "calm")

    def different(folder: Path) -> list[str]:
        after = _tree(folder)
        return sorted(name for name in calm.keys() | after.keys() if calm.get(name) != after.get(name))

    draw = random.Random(11)
    plans: list[dict[str, Any]] = [{"at_change": n} for n in sorted(draw.sample(range(1, changes), min(moments, changes - 1)))]
    plans += [{"after_seconds": draw.uniform(0.1, 0.9) * seconds} for _ in range(timers)]
    attempts: list[Attempt] = []
    for index, plan in enumerate(plans):
        folder = work / f"killed-{index}"
        code, *_ = _attempt(run, folder, **plan)
        stopped, finished = _names(folder), calm.items() <= _tree(folder).items()
        again, *_ = _attempt(run, folder)
        if finished and again == 2:
            again = 0  # killed after its last file was in place: a command without --resume refuses its own whole output
        attempts.append(Attempt(str(plan), code, again, different(folder), stopped))
        shutil.rmtree(folder)
    codes: list[int] = []
    left: set[str] = set()
    folder = work / "often"
    while not codes or codes[-1] != 0:
        at_change = draw.randint(2, max(3, changes // 2)) if len(codes) < most_kills else None
        codes.append(_attempt(run, folder, at_change)[0])
        left.update(_names(folder) if codes[-1] else ())
    attempts.append(Attempt("again and again", codes[0], codes[-1], different(folder), sorted(left)))
    print("REPORT " + json.dumps({"files": sorted(calm), "attempts": [asdict(attempt) for attempt in attempts]}))


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main(spec["command"], Path(spec["work"]), spec["moments"], spec["timers"], spec["most_kills"])
