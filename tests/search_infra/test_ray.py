"""A search on two Ray nodes of one machine, one of which dies in the middle."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from regraft.errors import InputError
from regraft.search.pools import Inline
from regraft.search.ray_pool import RayPool
from regraft.search.run import open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import open_storage
from search_fakes import SCHEDULE, SPACE, PlantedLearner, PlantedMeasure, measured

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each; the driver is connected to the first."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("PYTHONPATH", TESTS + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("RAY_health_check_period_ms", "300")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=small)
    try:
        made.second = made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.mark.long
def test_a_node_dies_and_its_candidates_are_measured_elsewhere(cluster: Any, tmp_path: Path) -> None:
    sampler = AllocatorSampler(SPACE, PlantedLearner(), SCHEDULE, seed=0)

    def kill_the_second() -> None:
        # Both nodes are at work then, and none is done before the second is dead.
        while not (tmp_path / "log").exists() or len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) < 2:
            time.sleep(0.05)
        raylet = psutil.Process(cluster.second.all_processes["raylet"][0].process.pid)
        workers = raylet.children(recursive=True)
        cluster.remove_node(cluster.second, allow_graceful=False)
        for worker in workers:  # they would live on for a moment; a machine that dies takes them along
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        (tmp_path / "killed").touch()

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    opened = open_search(open_storage(None, tmp_path), "planted", SPACE, sampler, "", resume=False)
    with RayPool(PlantedMeasure(tmp_path / "log", waits_for=tmp_path / "killed"), cluster.address) as pool:
        assert pool.size == 2
        found = search(opened, sampler, pool, lambda job, trial: None)
    killer.join()
    (tmp_path / "alone").mkdir()
    alone = open_search(open_storage(None, tmp_path / "alone"), "planted", SPACE, sampler, "", resume=False)
    with Inline(PlantedMeasure(tmp_path / "alone.log")) as pool:
        assert search(alone, sampler, pool, lambda job, trial: None) == found
    begun, expected = Counter(measured(tmp_path / "log")), Counter(measured(tmp_path / "alone.log"))
    assert begun.keys() == expected.keys()
    assert sum((begun - expected).values()) == 1, "only what was on the node that died is measured again"


def test_no_cluster_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match=r"no Ray cluster is at '127\.0\.0\.1:1' .*; begin one with `ray start --head`") as caught:
        RayPool(PlantedMeasure(Path("log")), "127.0.0.1:1")
    assert "\n" not in str(caught.value)
