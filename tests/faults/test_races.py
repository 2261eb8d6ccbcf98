"""Two processes on one output at once: one writes all of it, the other says who does or that it exists; no file is of both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked import Command, Ended, Forks
from stages import STAGES, Stage, clear, contents, make_start, other_files

PAIRS = 1  # of each command
REFUSED = re.compile(r"^error: .*(is in use by (process \d+ on .* since .*|another process)|exists)")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forks, Path]]:
    with Forks() as forks:
        folder = tmp_path_factory.mktemp("races")
        make_start(forks, folder)
        yield forks, folder


def race(forks: Forks, folder: Path, stage: Stage, delay_s: float) -> list[Ended]:
    """Runs a command twice at the same time, the second a little later."""
    line = (*stage.line, "-o", stage.output)
    return forks.at_once(Command(str(folder), line), Command(str(folder), line, delay_s=delay_s))


def problem(folder: Path, stage: Stage, ended: list[Ended], alone: dict[str, str]) -> str:
    """Returns what is wrong with how a race ended; empty where nothing is."""
    codes = sorted(one.code if one.code is not None else -1 for one in ended)
    lost = [one for one in ended if one.code != 0]
    if codes != [0, 2]:
        return f"exit codes {codes}: {[one.err[-300:] for one in lost]}"
    if not REFUSED.match(lost[0].lines[-1]):
        return f"the second was told: {lost[0].err[-300:]}"
    return other_files(folder, stage, alone)


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_two_at_once_give_what_one_gives(start: tuple[Forks, Path], name: str) -> None:
    forks, folder = start
    stage = STAGES[name]
    done = forks.run(folder, *stage.line, "-o", stage.output)
    assert done.code == 0, done.err
    alone = contents(folder, stage)
    assert alone
    assert clear(folder, stage) == []
    for pair in range(PAIRS):
        ended = race(forks, folder, stage, pair / PAIRS * min(1.0, done.seconds))
        assert problem(folder, stage, ended, alone) == ""
        assert clear(folder, stage) == []
