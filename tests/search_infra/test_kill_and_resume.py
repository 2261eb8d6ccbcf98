"""A search that is killed, and searches that share a book: nothing is measured twice and the answer is the same."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

from search_fakes import measured
from search_process import begin, finish, wait_for


def test_killed_twice_and_resumed_repeats_nothing_that_was_finished(tmp_path: Path) -> None:
    whole = finish(begin(tmp_path / "whole", tmp_path / "whole.log", 0))
    log = tmp_path / "killed.log"
    for lines in (2, 6):
        process = begin(tmp_path / "killed", log, 0.3)
        wait_for(log, lines)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(begin(tmp_path / "killed", log, 0)) == whole
    begun, expected = Counter(measured(log)), Counter(measured(tmp_path / "whole.log"))
    assert begun.keys() == expected.keys()
    repeated = begun - expected
    # What was being measured when the process was killed is begun anew; everything else was on the disk.
    assert sum(repeated.values()) == 2


def test_two_processes_share_a_search(tmp_path: Path) -> None:
    whole = finish(begin(tmp_path / "whole", tmp_path / "whole.log", 0))
    log, url = tmp_path / "shared.log", f"sqlite:///{tmp_path / 'shared.db'}"
    both = [begin(tmp_path / name, log, 0.4, url) for name in ("a", "b")]
    assert [finish(process) for process in both] == [whole, whole]
    assert Counter(measured(log)) == Counter(measured(tmp_path / "whole.log"))
    assert len({line.split()[0] for line in log.read_text().splitlines()}) == 2
