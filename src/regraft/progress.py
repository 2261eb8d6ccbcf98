"""Progress of a long stage, as lines: what is done now and, where it is counted, how far it is."""

from __future__ import annotations

from collections.abc import Callable


class Step(str):
    """A line of progress that knows its count, so that whoever shows it can draw a bar and foresee the end.

    Args:
        doing: What is done, such as ``measuring the damage of layers``.
        done: How many are finished.
        total: How many there are.
        found: What was found so far, such as a loss.

    >>> str(Step("scoring layers", 3, 12)), str(Step("training", 3, 12, "loss 2.5"))
    ('scoring layers: 3 of 12', 'training: 3 of 12, loss 2.5')
    """

    doing: str
    done: int
    total: int
    found: str

    def __new__(cls, doing: str, done: int, total: int, found: str = "") -> Step:
        """Makes the line of a count."""
        line = super().__new__(cls, f"{doing}: {done} of {total}{', ' if found else ''}{found}")
        line.doing, line.done, line.total, line.found = doing, done, total, found
        return line


EVERY = "REGRAFT_PROGRESS_SECONDS"
"""Environment variable: seconds between two lines of progress of a command that has no terminal; 30 without it."""

Say = Callable[[str], None]
"""Called with one line, often a :class:`Step`, whenever a stage gets on."""

SayCount = Callable[[int, int], None]
"""Called with how many are finished and how many there are."""


def say_nothing(line: str) -> None:
    """Shows no progress."""
