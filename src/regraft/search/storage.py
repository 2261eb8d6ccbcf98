"""Where trials are kept: an SQLite file in the search's own folder, or a database by URL that many machines share.

Both are Optuna's ``RDBStorage``, so that ``optuna-dashboard`` reads them. SQLite commits are flushed to the disk, which is what "on
disk before the next begins" rests on; PostgreSQL does the same.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import make_url
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from regraft.errors import InputError, MissingDependencyError, OutputError, StorageError

FILE = "search.db"
HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 60
_PATIENCE_SECONDS = 10
_AGAIN_SECONDS = (0.1, 0.3, 1.0, 2.0)
_DRIVERS = {"postgresql": ("psycopg", "postgres")}


T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """An open store of trials.

    Attributes:
        backend: Optuna's.
        engine: SQLAlchemy's, whose connections are to be closed.
        shown: Its name for messages, without a password.
        shared: Whether other machines may use it at the same time.
        heartbeat_seconds: How often whoever measures says that it is alive.
        grace_seconds: After how long without such a sign its trials are measured by somebody else.
    """

    backend: BaseStorage
    engine: Engine
    shown: str
    shared: bool
    heartbeat_seconds: int
    grace_seconds: int

    def close(self) -> None:
        """Closes the connections; needed again, they are opened again."""
        self.backend.remove_session()
        self.engine.dispose()


def open_storage(
    url: str | None, folder: Path, *, heartbeat_seconds: int = HEARTBEAT_SECONDS, grace_seconds: int = GRACE_SECONDS
) -> Storage:
    """Opens the store of trials, and makes its tables where there are none.

    Args:
        url: A database, such as ``postgresql://user@host/name``; None for a file in the folder.
        folder: The search's own.
        heartbeat_seconds: How often whoever measures says that it is alive.
        grace_seconds: After how long without such a sign its trials are measured by somebody else.

    Raises:
        InputError: It is not a URL of a database.
        MissingDependencyError: The database's driver is not installed.
        StorageError: The database is locked, corrupt or out of reach.
    """
    target = URL.create("sqlite", database=str(folder.absolute() / FILE)) if url is None else _database(url)
    shown = f"'{folder / FILE}'" if url is None else f"'{masked(url)}'"
    sqlite = target.get_backend_name() == "sqlite"
    if sqlite and target.database:
        _check_file(Path(target.database), shown)
    patience = {"timeout" if sqlite else "connect_timeout": _PATIENCE_SECONDS}
    with storage_errors(shown), quiet_optuna():
        backend = together(
            lambda: RDBStorage(
                target.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": patience, "pool_pre_ping": not sqlite},
                heartbeat_interval=heartbeat_seconds,
                grace_period=grace_seconds,
            )
        )
    return Storage(
        get_storage(backend),
        backend.engine,
        shown,
        shared=url is not None,
        heartbeat_seconds=heartbeat_seconds,
        grace_seconds=grace_seconds,
    )


def together(write: Callable[[], T]) -> T:
    """Does what several processes may be doing at the same moment, such as making the same tables; whoever is second does it again."""
    for pause_seconds in _AGAIN_SECONDS:
        try:
            return write()
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if "already exists" not in str(error) and not isinstance(error, IntegrityError):
                raise
            time.sleep(pause_seconds)
    return write()


def masked(url: str) -> str:
    """Returns a URL without its password.

    >>> masked("postgresql://me:secret@host:5432/trials")
    'postgresql://me:***@host:5432/trials'
    """
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def _database(url: str) -> URL:
    """Reads the URL of a database and chooses the driver that we bring.

    Raises:
        InputError: It is no such URL.
        MissingDependencyError: The driver is not installed.
    """
    example = "write it as postgresql://user@host/name or sqlite:///file.db"
    try:
        target = make_url(url)
        if target.drivername == "postgres":
            target = target.set(drivername="postgresql")
        driver, extra = _DRIVERS.get(target.drivername, ("", ""))
        if driver and importlib.util.find_spec(driver) is None:
            raise MissingDependencyError(driver, extra)
        if driver:
            target = target.set(drivername=f"{target.drivername}+{driver}")
        target.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        raise InputError(f"--storage '{url}' is not the URL of a known database; {example}") from None
    return target


def _check_file(path: Path, shown: str) -> None:
    """Refuses an SQLite file that cannot be one, with the reason that SQLite itself does not give.

    Raises:
        OutputError: Its folder does not exist.
        StorageError: It is a folder, or not a database.
    """
    if not path.parent.is_dir():
        raise OutputError(f"the folder of storage {shown} does not exist; make it first, or choose another --storage")
    if path.is_dir():
        raise StorageError(f"storage {shown} is a folder; give the name of a file")
    try:
        start = _first_bytes(path) if path.exists() else b""
    except OSError as error:
        raise StorageError(f"storage {shown} cannot be read: {error.strerror}; check its permissions") from None
    if start and start != b"SQLite format 3\0":
        raise StorageError(f"storage {shown} is corrupt or not an SQLite file; restore it from a copy, or remove it to begin anew")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(16)


@contextmanager
def storage_errors(shown: str) -> Iterator[None]:
    """Turns the errors of databases into one line each.

    Raises:
        StorageError: Inside the block the store was locked, corrupt or out of reach.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause: BaseException = error
        if isinstance(error, StorageInternalError) and error.__cause__ is not None:
            cause = error.__cause__
        raise StorageError(_explained(cause, shown)) from error
    except RuntimeError as error:  # Optuna's refusal of tables that another version of it has made
        if "optuna storage upgrade" not in str(error) and "version" not in str(error):
            raise
        raise StorageError(f"storage {shown} was made by another version of Optuna; run: optuna storage upgrade, or use another") from error


def _explained(error: BaseException, shown: str) -> str:
    reason = " ".join(str(getattr(error, "orig", None) or error).split())
    reason = reason.split(" (Background on")[0][:200]
    low = reason.lower()
    if "locked" in low or "lock timeout" in low:
        return f"storage {shown} is locked by another program ({reason}); wait for it, or close what holds it, and go on with --resume"
    if any(sign in low for sign in ("malformed", "not a database", "corrupt", "no such column", "no such table")):
        return f"storage {shown} is corrupt ({reason}); restore it from a copy, or remove it to begin anew"
    if "readonly" in low or "read-only" in low or "permission denied" in low:
        return f"storage {shown} cannot be written ({reason}); check its permissions"
    if ("full" in low and ("disk" in low or "database" in low)) or "no space left" in low:
        return f"the disk of storage {shown} is full ({reason}); free some space and go on with --resume"
    if isinstance(error, OperationalError | InterfaceError):
        return f"storage {shown} cannot be reached ({reason}); check address, user and password, and go on with --resume"
    if isinstance(error, DatabaseError):
        return f"storage {shown} refuses to work ({reason}); check its permissions, or use another --storage"
    return f"storage {shown} fails ({reason}); use another --storage"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna from telling of every study, and from warning of what it calls experimental: heartbeats, since its version 2.9."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
