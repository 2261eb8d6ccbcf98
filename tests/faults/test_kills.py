"""Killed at drawn moments, before a rename, a flush or a removal, and begun again: every file is what an undisturbed run leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked import Command, Forks
from stages import STAGES, Stage, clear, contents, make_start, other_files

KILLS = 2  # of each command


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forks, Path]]:
    with Forks() as forks:
        folder = tmp_path_factory.mktemp("kills")
        make_start(forks, folder)
        yield forks, folder


def problem(forks: Forks, folder: Path, stage: Stage, kill: Command, alone: dict[str, str]) -> str:
    """Kills a command and runs it again; returns what is wrong with what is there then, empty where nothing is."""
    killed = forks.at_once(kill)[0]
    at = f"killed at write {kill.die_at}, {kill.kill_after_s} s"
    if killed.code not in (-9, 0):
        return f"{at}: ended with {killed.code}: {killed.err[-300:]}"
    if (folder / stage.output).exists() and not stage.resume:
        found = contents(folder, stage)  # the output has its name: it is whole
        return "" if found == alone else f"{at}: half an output: {sorted(set(found.items()) ^ set(alone.items()))[:4]}"
    again = forks.run(folder, *stage.again())
    if again.code != 0:
        return f"{at}: begun again it says {again.err[-300:]}"
    found = other_files(folder, stage, alone)
    return found and f"{at}: {found}"


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_killed_and_begun_again_it_ends_with_the_same_files(start: tuple[Forks, Path], name: str) -> None:
    forks, folder = start
    stage = STAGES[name]
    line = (*stage.line, "-o", stage.output)
    done = forks.run(folder, *line)
    assert done.code == 0, done.err
    assert done.writes > 5
    alone = contents(folder, stage)
    clear(folder, stage)
    draw = random.Random(name)
    for moment in sorted(draw.sample(range(1, done.writes + 1), min(KILLS, done.writes))):
        assert problem(forks, folder, stage, Command(str(folder), line, die_at=moment), alone) == ""
        clear(folder, stage)
    left = [entry for entry in os.listdir(folder) if entry.startswith(".") and not entry.endswith(".regraft")]
    assert left == []
