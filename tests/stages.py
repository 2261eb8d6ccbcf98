"""The commands that write, on a tiny model, and how the files of two outputs are compared; for races and kills."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from forked import Forks
from tiny_inputs import make_inputs

RATINGS = "\n".join(
    ["user,item,rating", *(f"{user},{item},{user * item % 5 + 1}" for user in range(12) for item in range(10) if (user + item) % 3)]
)
_TRAIN = ["--data", "text.txt", "--seq-len", "16", "--batch", "2", "--held-out-windows", "4", "--device", "cpu"]
_CHEAPLY = ["--elastic", "0", "--confirm-seeds", "0", "--ranks", "1,2,3", "--budget", "r=2"]
_RECOVER = ["recover", "pruned", *_TRAIN, "--steps", "4", "--eval-every", "1", "--rank", "2", "--quiet"]


@dataclass(frozen=True)
class Stage:
    """A command that writes.

    Attributes:
        line: Its command line without the output.
        output: What it writes.
        beside: What it writes beside that.
        resume: Whether ``--resume`` goes on with it.
        free: Files that hold seconds, and may differ.
    """

    line: tuple[str, ...]
    output: str = "out"
    beside: tuple[str, ...] = ()
    resume: bool = False
    free: tuple[str, ...] = ("timings.json",)

    def again(self) -> tuple[str, ...]:
        """Returns the command line that goes on."""
        return (*self.line, "-o", self.output, *(["--resume"] if self.resume else []))


_ALLOCATE = ("allocate", "pruned", *_TRAIN, "--steps", "8", "--samples", "2", "--trials", "2", *_CHEAPLY)

STAGES = {
    "prune": Stage(("prune", "model", "--criterion", "l2", "--device", "cpu")),
    "prune --memory": Stage(("prune", "model", "--criterion", "l2", "--memory", "1GB", "--device", "cpu")),
    "prune --plan-only": Stage(("prune", "model", "--criterion", "l2", "--plan-only", "--device", "cpu"), "out.json"),
    "export": Stage(("export", "adapter", "--to", "merged", "--device", "cpu")),
    "export --to peft-lora": Stage(("export", "adapter", "--to", "peft-lora", "--device", "cpu")),
    "complete": Stage(("complete", "r.csv", "--rank", "2", "--threshold", "0.1", "--recommend", "2")),
    "recover": Stage(tuple(_RECOVER), resume=True),
    "compress": Stage(("compress", "model", "--calibration", "text.txt", "--samples", "4", "--seq-len", "16", "--device", "cpu")),
    "allocate": Stage(_ALLOCATE, "out.json", ("out.search",), resume=True),
    "run": Stage(("run", "recipe.yaml"), resume=True),
}
# Its workers import everything anew, which takes 20 s of processor time each time: tried by benchmarks/faults.py alone.
DEAR_STAGES = {"allocate --workers 2": Stage((*_ALLOCATE, "--workers", "2"), "out.json", ("out.search",), resume=True)}


def make_start(forks: Forks, folder: Path) -> None:
    """Writes a tiny model, its pruned form, an adapter, ratings and a recipe into a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_inputs()
    finally:
        os.chdir(before)
    (folder / "r.csv").write_text(RATINGS, encoding="utf-8")
    for line in (("prune", "model", "--criterion", "l2", "--device", "cpu", "-o", "pruned"), (*_RECOVER, "--no-merge", "-o", "adapter")):
        done = forks.run(folder, *line)
        assert done.code == 0, (line, done.err)


def contents(folder: Path, stage: Stage) -> dict[str, str]:
    """Returns the SHA-256 of every file of an output, by name, but for those that hold seconds."""
    found: dict[str, str] = {}
    for name in (stage.output, *stage.beside):
        path = folder / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.name not in stage.free:
                found[file.relative_to(folder).as_posix()] = _digest(file)
    return found


def other_files(folder: Path, stage: Stage, alone: dict[str, str]) -> str:
    """Returns which files of an output differ from those of an undisturbed run, the first of them; empty where none does."""
    differing = sorted(set(contents(folder, stage).items()) ^ set(alone.items()))
    return f"other files: {differing[:4]}" if differing else ""


def _digest(file: Path) -> str:
    if file.suffix == ".db":
        return ""  # what SQLite writes depends on when it writes: its pages hold times, and the order of free pages
    content = file.read_bytes()
    if file.name == "report.json":  # of a completion, which says how long it took
        content = json.dumps({key: value for key, value in json.loads(content).items() if key != "seconds"}).encode()
    return hashlib.sha256(content).hexdigest()


def clear(folder: Path, stage: Stage) -> list[str]:
    """Removes an output; returns what lies beside it that should not."""
    for name in (stage.output, *stage.beside):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return [name for name in os.listdir(folder) if name.startswith(".")]
