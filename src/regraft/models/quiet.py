"""Silencing of transformers and torch while they load, save and trace, and shortening of their error messages."""

from __future__ import annotations

import logging as logs
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

LONGEST_QUOTE = 240  # largest number of characters of another library's message


@contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings, reports and progress bars of transformers and the log of torch inside the block; exceptions still pass."""
    verbosity, bars, disabled = logging.get_verbosity(), logging.is_progress_bar_enabled(), logs.root.manager.disable
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    logs.disable(logs.ERROR)  # torch logs the traceback of a failed trace before it raises the error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.disable(disabled)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def in_one_line(error: BaseException) -> str:
    """Returns the message of another library's error as one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:LONGEST_QUOTE].rstrip(". ") + ("…" if len(text) > LONGEST_QUOTE else "")
