"""Kills and races in real processes: of every command, the files that are left against those of an undisturbed run.

    python benchmarks/faults.py [--count 50] [--minutes N] [--only kills|races]

A kill is a SIGKILL before a drawn write, rename, flush or removal; the command is then begun again (with ``--resume`` where it has that).
A race is the same command twice on one output, the second up to a second later: one has to write all of it, the other to say so in one line.
Every file is compared but the database of a search and files of seconds. Rounds of five go through all commands, so that a run that
ends early has tried all of them; counts are written to ``results/faults_kills.csv`` and ``faults_races.csv`` after every round.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from common import RESULTS, machine, read_rows, table, versions, write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

from forked import Command, Forks
from stages import STAGES, clear, contents, make_start

test_kills, test_races = import_module("test_kills"), import_module("test_races")
ROUND = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--only", choices=("kills", "races"), default=None)
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    for what in ("kills", "races") if asked.only is None else (asked.only,):
        with Forks() as forks, tempfile.TemporaryDirectory() as name:
            tried(forks, Path(name), what, asked.count, end)
    draw()


def tried(forks: Forks, folder: Path, what: str, count: int, end: float) -> None:
    """Tries a number of kills or races of every command, and writes the counts after every round."""
    make_start(forks, folder)
    alone: dict[str, dict[str, str]] = {}
    writes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name, stage in STAGES.items():
        done = forks.run(folder, *stage.line, "-o", stage.output)
        alone[name], writes[name], seconds[name] = contents(folder, stage), done.writes, done.seconds
        clear(folder, stage)
    draw_moment = random.Random(what)
    done_of, problems = dict.fromkeys(STAGES, 0), {name: list[str]() for name in STAGES}
    for _ in range(0, count, ROUND):
        for name, stage in STAGES.items():
            for _ in range(ROUND):
                if time.monotonic() > end:
                    break
                line = (*stage.line, "-o", stage.output)
                if what == "kills":
                    kill = Command(str(folder), line, die_at=draw_moment.randint(1, writes[name]))
                    found = test_kills.problem(forks, folder, stage, kill, alone[name])
                else:
                    ended = test_races.race(forks, folder, stage, draw_moment.random() * min(1.0, seconds[name]))
                    found = test_races.problem(folder, stage, ended, alone[name])
                done_of[name] += 1
                if found:
                    problems[name].append(found)
                    print(what, name, found, flush=True)
                clear(folder, stage)
        rows = [
            {
                "what": what,
                "command": name,
                "tried": done_of[name],
                "problems": len(problems[name]),
                "first": (problems[name] or [""])[0][:200],
            }
            for name in STAGES
        ]
        write_rows(RESULTS / f"faults_{what}.csv", rows)


def draw() -> None:
    """Draws the table of both files of counts."""
    lines = ["# Kills and races", "", f"{machine()}; {versions('regraft', 'torch', 'transformers')}", ""]
    for what in ("kills", "races"):
        rows = read_rows(RESULTS / f"faults_{what}.csv")
        if rows:
            body = [[row["command"], row["tried"], row["problems"], row["first"]] for row in rows]
            lines += [f"## {what.capitalize()}", "", *table(("command", "tried", "with another outcome", "the first of these"), body)]
    (RESULTS / "faults.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
