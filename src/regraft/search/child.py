"""Start of a measuring process: bound to its parent before anything that takes time to import."""

from __future__ import annotations

import importlib
from multiprocessing.connection import Connection

from regraft.signals import die_with_parent


def begin(pipe: Connection, threads: int, parent: int) -> None:
    """Ends with the parent from here on, then imports what measures and serves the pipe; runs in a child process.

    Args:
        pipe: Gives what is to be opened for measuring, then groups of jobs.
        threads: Number of threads that the process may use.
        parent: The process that has started this one.
    """
    die_with_parent(parent)
    importlib.import_module("regraft.search.pools").serve(pipe, threads)
