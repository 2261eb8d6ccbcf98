"""The planted search in a process of its own, to be killed; called as a script with FOLDER LOG SECONDS [URL]."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fresh
from regraft.search.pools import Inline
from regraft.search.run import open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import open_storage
from search_fakes import SCHEDULE, SPACE, PlantedLearner, PlantedMeasure


def begin(folder: Path, log: Path, seconds: float, *url: str) -> fresh.Process:
    folder.mkdir(exist_ok=True)
    return fresh.Process([__file__, str(folder), str(log), str(seconds), *url])


def finish(process: fresh.Process) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def wait_for(log: Path, lines: int) -> None:
    limit = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert time.monotonic() < limit, "the search does not begin"
        time.sleep(0.02)


def main(folder: Path, log: Path, seconds: float, url: str | None) -> None:
    sampler = AllocatorSampler(SPACE, PlantedLearner(), SCHEDULE, seed=0)
    opened = open_search(
        open_storage(url, folder, heartbeat_seconds=1, grace_seconds=30), "planted", SPACE, sampler, "planted", resume=True
    )
    with Inline(PlantedMeasure(log, seconds)) as pool:
        found = search(opened, sampler, pool, lambda job, trial: None)
    print(json.dumps([[job.key, trial.ranks, trial.loss_nats] for job, trial in found]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
