"""The disk full at a drawn write of every command that writes, and no memory: one line, no half output; with room, the same files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked import Command, Forks
from stages import STAGES, Stage, clear, contents, make_start, other_files

MOMENTS = 2  # of each command; benchmarks/faults.py tries more


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forks, Path]]:
    with Forks() as forks:
        folder = tmp_path_factory.mktemp("full")
        make_start(forks, folder)
        yield forks, folder


def problem(forks: Forks, folder: Path, stage: Stage, full_at: int, alone: dict[str, str]) -> str:
    """Runs a command whose disk is full from one write on, and again with room; returns what is wrong, empty where nothing is."""
    full = forks.at_once(Command(str(folder), (*stage.line, "-o", stage.output), full_at=full_at))[0]
    at = f"full at write {full_at}"
    whole = (folder / stage.output).exists() and contents(folder, stage) == alone
    if full.code == 0 and whole:
        return ""  # only what may be left out found no room
    errors = [line for line in full.lines if line.startswith("error: ")]
    if full.code != 2 or len(errors) != 1 or "Traceback" in full.err:
        return f"{at}: ended with {full.code}: {full.err[-700:]}"
    if not any(words in errors[0] for words in ("disk is full", "No space left", "free some space")):
        return f"{at}: nothing of the disk in {errors[0]}"
    if (folder / stage.output).exists() and not whole and stage.line[0] != "run":  # whose folder is filled stage by stage
        return f"{at}: half an output: {sorted(contents(folder, stage))}"
    again = forks.run(folder, *stage.again())
    if again.code != 0 and not (whole and "exists" in again.err):
        return f"{at}: begun again it says {again.err[-300:]}"
    found = other_files(folder, stage, alone)
    return found and f"{at}: {found}"


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_without_room_it_says_so_and_with_room_it_ends_with_the_same_files(start: tuple[Forks, Path], name: str) -> None:
    forks, folder = start
    stage = STAGES[name]
    done = forks.run(folder, *stage.line, "-o", stage.output)
    assert done.code == 0, done.err
    assert done.filled > 3
    alone = contents(folder, stage)
    clear(folder, stage)
    for moment in sorted(random.Random(name).sample(range(1, done.filled + 1), min(MOMENTS, done.filled))):
        assert problem(forks, folder, stage, moment, alone) == ""
        clear(folder, stage)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "recover"])
def test_without_memory_it_names_the_settings_that_need_less(start: tuple[Forks, Path], command: str) -> None:
    forks, folder = start
    line = {
        "prune": ("prune", "model", "--calibration", "text.txt", "--samples", "300", "--seq-len", "64", "--criterion", "wanda"),
        "recover": ("recover", "pruned", "--data", "text.txt", "--seq-len", "64", "--batch", "200", "--steps", "1", "--quiet"),
    }[command]
    done = forks.run(folder, *line, "-o", "none", setup=["little_memory:20000000"])
    assert done.code == 2, done.err
    (said,) = [one for one in done.lines if one.startswith("error:")]
    assert "the memory of this machine is not enough (at: " in said  # the step that was under way
    assert {"prune": "--samples", "recover": "--batch"}[command] in said
    assert not (folder / "none").exists()
    assert not list(folder.glob(".none*"))
