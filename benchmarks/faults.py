"""Kills, races and full disks in real processes: of every command, the files that are left against those of an undisturbed run.

    python benchmarks/faults.py [--count 50] [--minutes N] [--only kills|races|full] [--commands allocate,run]

A kill is a SIGKILL before a drawn write, rename, flush or removal; the command is then begun again (with ``--resume`` where it has that).
A race is the same command twice on one output, the second up to a second later: one has to write all of it, the other to say so in one line.
A full disk refuses everything from a drawn write on, and has room again for the second attempt.
Every file is compared but the database of a search and files of seconds. Rounds of five go through all commands, the least tried first;
counts are written to ``results/faults_kills.csv``, ``faults_races.csv`` and ``faults_full.csv`` after every round. A further call adds to the counts that are
there, at other moments: whoever changes what a command writes removes its rows first.
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

from forked import Command, Ended, Forks
from stages import DEAR_STAGES, STAGES, clear, contents, make_start

test_kills, test_races, test_no_room = (import_module(f"test_{name}") for name in ("kills", "races", "no_room"))
ROUND = 5
PATIENCE_S = 1800.0  # what hangs is found by tests of its own: beside other work a command may take long
ALL = STAGES | DEAR_STAGES
TITLES = {"kills": "Kills", "races": "Races", "full": "Full disks"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--only", choices=TITLES, default=None)
    parser.add_argument("--commands", default=",".join(STAGES))
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    for what in TITLES if asked.only is None else (asked.only,):
        with Forks(PATIENCE_S) as forks, tempfile.TemporaryDirectory() as name:
            make_start(forks, Path(name))
            tried(forks, Path(name), Counts(what), asked.commands.split(","), asked.count, end)
    draw()


class Counts:
    """How often every command was tried, and with what outcome: the rows of one table, kept in its file."""

    def __init__(self, what: str) -> None:
        self.what, self._file = what, RESULTS / f"faults_{what}.csv"
        kept = {row["command"]: row for row in read_rows(self._file)}
        self._rows = {
            name: {
                "what": what,
                "command": name,
                "tried": int(kept[name]["tried"]) if name in kept else 0,
                "problems": int(kept[name]["problems"]) if name in kept else 0,
                "first": kept[name]["first"] if name in kept else "",
            }
            for name in ALL
        }

    def tried(self, command: str) -> int:
        return int(self._rows[command]["tried"])

    def add(self, command: str, problem: str) -> None:
        row = self._rows[command]
        row["tried"] = int(row["tried"]) + 1
        if problem:
            row["problems"] = int(row["problems"]) + 1
            row["first"] = row["first"] or problem[:200]
            print(self.what, command, problem, flush=True)

    def write(self) -> None:
        write_rows(self._file, list(self._rows.values()))


def tried(forks: Forks, folder: Path, counts: Counts, commands: list[str], count: int, end: float) -> None:
    """Tries one kind of fault until every command has its number of them, and writes the counts after every round."""
    alone: dict[str, tuple[dict[str, str], Ended]] = {}
    while time.monotonic() < end:
        name = min(commands, key=counts.tried)
        begun = counts.tried(name)
        if begun >= count:
            break
        stage, draw_moment = ALL[name], random.Random(f"{counts.what} {name} {begun}")
        if name not in alone:
            done = forks.run(folder, *stage.line, "-o", stage.output)
            alone[name] = contents(folder, stage), done
            clear(folder, stage)
        files, done = alone[name]
        for _ in range(min(ROUND, count - begun)):
            if counts.what == "kills":
                kill = Command(str(folder), (*stage.line, "-o", stage.output), die_at=draw_moment.randint(1, done.writes))
                found = test_kills.problem(forks, folder, stage, kill, files)
            elif counts.what == "full":
                found = test_no_room.problem(forks, folder, stage, draw_moment.randint(1, done.filled), files)
            else:
                ended = test_races.race(forks, folder, stage, draw_moment.random() * min(1.0, done.seconds))
                found = test_races.problem(folder, stage, ended, files)
            counts.add(name, found)
            clear(folder, stage)
        counts.write()


def draw() -> None:
    """Draws the tables of the files of counts."""
    lines = ["# Kills, races and full disks", "", f"{machine()}; {versions('regraft', 'torch', 'transformers')}", ""]
    for what, title in TITLES.items():
        rows = read_rows(RESULTS / f"faults_{what}.csv")
        if rows:
            body = [[row["command"], row["tried"], row["problems"], row["first"]] for row in rows]
            lines += [f"## {title}", "", *table(("command", "tried", "with another outcome", "the first of these"), body)]
    (RESULTS / "faults.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
