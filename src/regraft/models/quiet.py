"""Keeps the terminal clean while transformers loads and saves, and its errors short."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

LONGEST_QUOTE = 240  # characters of another library's message


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings, reports and progress bars of transformers inside the block; errors still pass."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def in_one_line(error: BaseException) -> str:
    """Returns an error of another library in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:LONGEST_QUOTE].rstrip(". ") + ("…" if len(text) > LONGEST_QUOTE else "")
