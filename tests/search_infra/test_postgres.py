"""A search in a real PostgreSQL that the test starts for itself: two processes share it, one of them is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from regraft.errors import StorageError
from regraft.search.run import open_search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import open_storage
from search_fakes import SCHEDULE, SPACE, PlantedLearner, measured
from search_process import begin, finish, wait_for

pytest.importorskip("psycopg", reason="psycopg is not installed")
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
pytestmark = [pytest.mark.long, pytest.mark.skipif(not BINARIES and not shutil.which("initdb"), reason="PostgreSQL is not installed")]


def unprivileged() -> list[str]:
    """Returns what a command begins with so that it does not run as root, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return []
    if shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    return ["runuser", "-u", "nobody", "--"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A private server on a free port of this machine; yields its URL."""
    folder = Path(tempfile.mkdtemp(prefix="regraft-postgres-"))
    folder.chmod(0o777)
    binaries = BINARIES[-1] if BINARIES else Path(str(shutil.which("initdb"))).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"

    def run(*command: str) -> None:
        done = subprocess.run([*unprivileged(), *command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run(str(binaries / "initdb"), "-D", str(data), "-U", "regraft", "--auth", "trust", "--no-sync", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run(str(binaries / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql://regraft@127.0.0.1:{port}/postgres"
    finally:
        run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_processes_share_a_search_and_one_is_killed(server: str, tmp_path: Path) -> None:
    whole = finish(begin(tmp_path / "whole", tmp_path / "whole.log", 0))
    log = tmp_path / "shared.log"
    one, other = begin(tmp_path / "a", log, 0.5, server), begin(tmp_path / "b", log, 0.5, server)
    wait_for(log, 4)
    one.send_signal(signal.SIGKILL)
    one.communicate()
    assert finish(other) == whole
    begun, expected = Counter(measured(log)), Counter(measured(tmp_path / "whole.log"))
    assert begun.keys() == expected.keys()
    assert sum((begun - expected).values()) <= 1, "only what the killed process was measuring is measured again"
    # The search is over: whoever comes later is given the answer, and measures nothing.
    lines = len(measured(log))
    assert finish(begin(tmp_path / "c", log, 0.5, server)) == whole
    assert len(measured(log)) == lines


def test_a_database_that_is_not_there_is_said_in_one_line(server: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be reached .*does not exist.*; check address") as caught:
        open_storage(server.replace("/postgres", "/nothing").replace("regraft@", "regraft:secret@"), tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_searches_stand_in_one_database(server: str, tmp_path: Path) -> None:
    sampler = AllocatorSampler(SPACE, PlantedLearner(), SCHEDULE, seed=0)
    storage = open_storage(server, tmp_path)
    first, second = (open_search(storage, name, SPACE, sampler, name, resume=False) for name in ("one", "two"))
    first.postings.post(sampler.plan(first.postings.study) or (), give_up=True)
    assert [len(opened.postings.study.trials) for opened in (first, second)] == [3, 0]
    storage.close()
