"""The inputs that once failed, one after the other, at the command line: refused in one line, or working, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

import handed
from forked import Ended, Forks
from regraft.errors import shown

MOST_SECONDS = 45.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LONGEST_LINE = 2500
_KEPT = {".out.regraft", "out"}
_GOES_ON = re.compile(r"recover/checkpoint|env/stdout|env/file size limit memory|run/resume")  # finished, or kept to go on from
_NO_STDERR = ("env/stderr",)
_COLOURED = ("env/run FORCE",)  # colours are asked for


def verdict(case: handed.Handed, folder: Path, done: Ended, before: set[str]) -> str:
    """Returns what is wrong with how a command ended; empty where nothing is."""
    if done.code is None:
        return "hangs"
    if "Traceback" in done.err or "fault of ours" in done.err:
        return f"traceback: {done.err[-1500:]}"
    if done.code not in case.codes:
        return f"exit code {done.code} is not one of {case.codes}: {done.err[-500:]}"
    if not case.name.startswith(_COLOURED) and _CONTROL.search(done.out + done.err):
        return f"control characters: {(done.out + done.err)!r:.500}"
    if done.code == 0:
        return ""
    errors = [line for line in done.lines if line.startswith("error:")]
    if len(errors) != 1 and not case.name.startswith(_NO_STDERR):
        return f"no one line: {done.err[-500:]}"
    rest = [line for line in done.lines if not line.startswith(("error:", "  - ", "note:"))]
    if rest or any(len(line) > _LONGEST_LINE for line in done.lines):
        return f"more or longer lines: {done.err[-1500:]}"
    left = set(os.listdir(folder)) - before - {"mp", "gone"} - (_KEPT if _GOES_ON.match(case.name) else set())
    return f"left behind: {left}" if left else ""


@pytest.mark.long
def test_handed_inputs(tmp_path: Path) -> None:
    if not handed.CASES.is_file():
        pytest.skip(f"no inputs at {handed.CASES}")
    base = tmp_path / "base"
    base.mkdir()
    found: dict[str, str] = {}
    with Forks() as forks:
        handed.make_base(forks, base)
        for number, case in enumerate(handed.read_cases()):
            folder = tmp_path / str(number)
            folder.mkdir()
            command = handed.make(case, base, folder)
            before = set(os.listdir(folder))
            done = forks.at_once(command)[0]
            if "no mounts here" in done.err:
                continue
            if wrong := verdict(case, folder, done, before):
                found[shown(case.name, 100)] = wrong
            handed.open_again(folder)
            shutil.rmtree(folder)
    assert not found, "\n".join(f"{name}: {wrong}" for name, wrong in found.items())
