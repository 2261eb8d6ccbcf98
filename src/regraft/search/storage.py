"""Storage of trials: an SQLite file in the search's folder, or a database given by URL that many machines share.

Both are an Optuna ``RDBStorage``, so that ``optuna-dashboard`` can read them. SQLite and PostgreSQL flush every commit to disk; the
guarantee that a result is on disk before the next round begins depends on that.
"""

from __future__ import annotations

import importlib.util
import os
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

from regraft import errors
from regraft.errors import InputError, MissingDependencyError, OutputError, RegraftError, StorageError
from regraft.reading import check_ordinary, is_folder

FILE = "search.db"
HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 60
_PATIENCE_SECONDS = 10
_AGAIN_SECONDS = (0.1, 0.3, 1.0, 2.0)
_DRIVERS = {"postgresql": ("psycopg", "postgres")}


T = TypeVar("T")


@dataclass(frozen=True)
class Storage:
    """An open storage of trials.

    Attributes:
        backend: The Optuna storage.
        engine: The SQLAlchemy engine, whose connections must be closed.
        shown: Name for messages, without a password.
        shared: Whether other machines may use the storage at the same time.
        heartbeat_seconds: Interval of the heartbeats of measuring processes.
        grace_seconds: Time without a heartbeat after which a process counts as dead.
    """

    backend: BaseStorage
    engine: Engine
    shown: str
    shared: bool
    heartbeat_seconds: int
    grace_seconds: int

    def close(self) -> None:
        """Closes the connections, which are opened again when needed."""
        self.backend.remove_session()
        self.engine.dispose()


def open_storage(
    url: str | None, folder: Path, *, heartbeat_seconds: int = HEARTBEAT_SECONDS, grace_seconds: int = GRACE_SECONDS
) -> Storage:
    """Opens a storage of trials, and creates its tables if they do not exist.

    Args:
        url: URL of a database, such as ``postgresql://user@host/name``; None for a file in the folder.
        folder: Folder of the search.
        heartbeat_seconds: Interval of the heartbeats of measuring processes.
        grace_seconds: Time without a heartbeat after which a process counts as dead.

    Raises:
        InputError: The URL is not that of a known database.
        MissingDependencyError: The database's driver is not installed.
        StorageError: The database is locked, corrupt or unreachable.
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
    """Runs a write that other processes may attempt at the same moment, such as creating tables, and repeats it after a conflict."""
    for pause_seconds in _AGAIN_SECONDS:
        try:
            return write()
        except IntegrityError:
            time.sleep(pause_seconds)
        except (ProgrammingError, OperationalError) as error:
            if "already exists" not in str(error):
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
    except (ArgumentError, ValueError):
        return url


def _database(url: str) -> URL:
    """Parses the URL of a database and chooses the driver of our optional dependencies.

    Raises:
        InputError: The URL is not that of a known database.
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
        dialect = target.get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError, ImportError):
        raise InputError(f"`storage` '{errors.shown(masked(url))}' is not the URL of a known database; {example}") from None
    if dialect.is_async:
        raise InputError(f"`storage` '{errors.shown(masked(url))}' names a driver that does not wait for answers; {example}")
    try:
        dialect.import_dbapi()
    except ImportError as error:
        raise InputError(
            f"`storage` '{errors.shown(masked(url))}' needs a driver that is not installed ({errors.shown(error, 100)}); {example}"
        ) from None
    if target.get_backend_name() == "sqlite" and target.query:
        raise InputError(f"`storage` '{errors.shown(masked(url))}' has options, which files do not take; {example}")
    return target


def _check_file(path: Path, shown: str) -> None:
    """Refuses a path that cannot be an SQLite file, and gives the reason, which SQLite does not.

    Raises:
        OutputError: The folder of the file does not exist.
        StorageError: The path is a folder, or the file is unreadable or not a database.
    """
    if not is_folder(path.parent):
        raise OutputError(f"the folder of storage {shown} does not exist; make it first, or choose another `storage`")
    if is_folder(path):
        raise StorageError(f"storage {shown} is a folder; give the name of a file")
    try:
        start = _first_bytes(path) if os.path.lexists(path) and check_ordinary(path, StorageError) else b""
    except OSError as error:
        raise StorageError(f"storage {shown} cannot be read: {error.strerror}; check its permissions") from None
    if start and start != b"SQLite format 3\0":
        raise StorageError(f"storage {shown} is corrupt or not an SQLite file; restore it from a copy, or remove it to begin anew")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(16)


@contextmanager
def storage_errors(shown: str) -> Iterator[None]:
    """Turns errors of the database inside the block into one line.

    Raises:
        StorageError: The storage was locked, corrupt or unreachable inside the block.
    """
    try:
        yield
    except RegraftError:  # of the data or the model; some are ValueErrors too
        raise
    except (TypeError, ValueError) as error:  # options of a URL that the driver does not take
        raise StorageError(f"storage {shown} cannot be opened ({' '.join(str(error).split())[:200]}); check its URL") from error
    except SQLAlchemyError as error:
        raise StorageError(_explained(error, shown)) from error
    except StorageInternalError as error:
        raise StorageError(_explained(error.__cause__ or error, shown)) from error
    except RuntimeError as error:  # Optuna refuses tables that another version of it made
        if "optuna storage upgrade" not in str(error) and "version" not in str(error):
            raise
        raise StorageError(f"storage {shown} was made by another version of Optuna; run: optuna storage upgrade, or use another") from error


def check_readable(study: optuna.Study, shown: str) -> None:
    """Reads everything that a study holds, once: Optuna takes the values of its tables as it finds them.

    Raises:
        StorageError: A value is of another kind.
    """
    try:
        _ = study.user_attrs
        study.get_trials(deepcopy=False)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StorageError(f"storage {shown} is corrupt ({reason}); restore it from a copy, or remove it to begin anew") from error


def _explained(error: BaseException, shown: str) -> str:
    reason = " ".join(str(getattr(error, "orig", None) or error).split())
    reason = reason.split(" (Background on")[0][:200]
    low = reason.lower()
    if "locked" in low or "lock timeout" in low:
        return f"storage {shown} is locked by another program ({reason}); wait for it, or close what holds it, and go on with `resume`"
    if any(sign in low for sign in ("malformed", "not a database", "corrupt", "no such column", "no such table")):
        return f"storage {shown} is corrupt ({reason}); restore it from a copy, or remove it to begin anew"
    if "readonly" in low or "read-only" in low or "permission denied" in low:
        return f"storage {shown} cannot be written ({reason}); check its permissions"
    if ("full" in low and ("disk" in low or "database" in low)) or "no space left" in low:
        return f"the disk of storage {shown} is full ({reason}); free some space and go on with `resume`"
    match error:
        case OperationalError() | InterfaceError():
            return f"storage {shown} cannot be reached ({reason}); check address, user and password, and go on with `resume`"
        case DatabaseError():
            return f"storage {shown} refuses to work ({reason}); check its permissions, or use another `storage`"
        case _:
            return f"storage {shown} fails ({reason}); use another `storage`"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silences Optuna's messages about studies, and its warning that heartbeats (since its version 2.9) are experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
