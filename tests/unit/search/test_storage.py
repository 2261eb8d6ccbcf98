"""Stores of trials: what is wrong with them is said in one line, without a password."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from regraft.errors import InputError, OutputError, StorageError
from regraft.search import storage as module
from regraft.search.pools import Inline
from regraft.search.run import open_search, search
from regraft.search.sampler import AllocatorSampler
from regraft.search.storage import FILE, masked, open_storage
from search_fakes import SCHEDULE, SPACE, PlantedLearner, PlantedMeasure

SAMPLER = AllocatorSampler(SPACE, PlantedLearner(), SCHEDULE, seed=0)


def test_a_file_that_is_no_database_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("these are not the trials you are looking for")
    with pytest.raises(StorageError, match="corrupt or not an SQLite file; restore it") as caught:
        open_storage(None, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_damaged_database_is_corrupt(tmp_path: Path) -> None:
    open_storage(None, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    with pytest.raises(StorageError, match="corrupt") as caught:
        open_search(open_storage(None, tmp_path), "one", SPACE, SAMPLER, "", resume=False)
    assert "\n" not in str(caught.value)


def test_a_locked_database_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.2)
    storage = open_storage(f"sqlite:///{tmp_path / 'shared.db'}", tmp_path)
    other = sqlite3.connect(tmp_path / "shared.db")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StorageError, match=r"locked by another program .*; wait for it"):
            open_search(storage, "one", SPACE, SAMPLER, "", resume=False)
    finally:
        other.close()


def test_a_server_out_of_reach_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        open_storage("postgresql://me:secret@127.0.0.1:1/trials", tmp_path)
    assert "secret" not in str(caught.value)
    assert "me:***@127.0.0.1:1/trials" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["trials", "nonsense://host/name", "postgresql//host"])
def test_what_is_no_url_of_a_database_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the URL of a known database; write it as postgresql://"):
        open_storage(url, tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; make it first"):
        open_storage(f"sqlite:///{tmp_path / 'nowhere' / 'x.db'}", tmp_path)


def test_a_url_without_password_stays_as_it_is() -> None:
    assert masked("sqlite:///trials.db") == "sqlite:///trials.db"


@pytest.mark.slow
def test_a_search_goes_on_only_with_the_same(tmp_path: Path) -> None:
    open_search(open_storage(None, tmp_path), "one", SPACE, SAMPLER, "lr 1", resume=False)
    with pytest.raises(StorageError, match="begun with other settings"):
        open_search(open_storage(None, tmp_path), "one", SPACE, SAMPLER, "lr 2", resume=True)


@pytest.mark.long
def test_a_search_that_is_there_is_not_gone_on_with_by_accident(tmp_path: Path) -> None:
    opened = open_search(open_storage(None, tmp_path), "one", SPACE, SAMPLER, "", resume=False)
    with Inline(PlantedMeasure(tmp_path / "log")) as pool:
        search(opened, SAMPLER, pool, lambda job, trial: None)
    with pytest.raises(StorageError, match="go on with `resume`"):
        open_search(open_storage(None, tmp_path), "one", SPACE, SAMPLER, "", resume=False)
