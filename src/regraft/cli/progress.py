"""Progress on the standard error: a bar with the time that is left on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regraft.errors import shown
from regraft.progress import EVERY, Say, Step, say_nothing

EVERY_SECONDS = 30.0


def every_seconds() -> float:
    """Returns the time between two lines: that of the environment variable, at least a second, or half a minute."""
    value = os.environ.get(EVERY, "")
    return max(1.0, float(value[:6])) if value.isascii() and value.isdigit() else EVERY_SECONDS


@contextmanager
def progress(doing: str, *, quiet: bool = False, bar: bool = True, console: Console | None = None) -> Iterator[Say]:
    """Shows the progress of a block.

    Args:
        doing: What the block does, for the time before its first line.
        quiet: Show nothing.
        bar: Show a bar on a terminal; without it a terminal shows nothing, for commands that print lines of their own.
        console: The console to write to; None for the standard error.

    Yields:
        What the block calls with each line of its progress. An error that ends the block gets the last line as a note.
    """
    console = console or Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    last = doing

    def say(line: str) -> None:
        nonlocal last
        last = line
        show(line)

    with ExitStack() as stack:
        show: Say = say_nothing
        if not quiet and console.is_terminal and bar:
            shown_bar = stack.enter_context(_bar(console))
            show = _Bar(shown_bar, shown_bar.add_task(doing, total=None)).say
        elif not quiet and not console.is_terminal:
            lines = _Lines(console, doing)
            lines.start()
            stack.callback(lines.stop)
            show = lines.say
        try:
            yield say
        except Exception as error:
            error.add_note(last)  # for the line that says where memory ran out
            raise


def _bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


class _Bar:
    """A bar whose length is the count of the present step."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task
        self._doing = ""

    def say(self, line: str) -> None:
        match line:
            case Step():
                if line.doing != self._doing:  # another stage: its speed says nothing of this one's
                    self._doing = line.doing
                    self._bar.reset(self._task, total=line.total)
                words = f"{line.doing}, {line.found}" if line.found else line.doing
                self._bar.update(self._task, description=shown(words), completed=line.done, total=line.total)
            case _:
                self._doing = ""
                self._bar.update(self._task, description=shown(line), total=None)


class _Lines(threading.Thread):
    """A line every half minute, also while nothing new is said, so that a long stage is never silent."""

    def __init__(self, console: Console, doing: str) -> None:
        super().__init__(daemon=True)
        self._console = console
        self._ended = threading.Event()
        self._line = doing
        self._began = self._stage_began = time.monotonic()
        self._doing = doing

    def say(self, line: str) -> None:
        doing = line.doing if isinstance(line, Step) else line
        if doing != self._doing:
            self._doing, self._stage_began = doing, time.monotonic()
        self._line = line

    def run(self) -> None:
        while not self._ended.wait(every_seconds()):
            now = time.monotonic()
            left = remaining_seconds(self._line, now - self._stage_began)
            after = "" if left is None else f", about {in_words(left)} left of this step"
            self._console.print(f"{shown(self._line)} ({in_words(now - self._began)} so far{after})")

    def stop(self) -> None:
        self._ended.set()
        self.join()


def remaining_seconds(line: str, since_seconds: float) -> float | None:
    """Returns how long a counted step will still take at its mean speed so far, or None where nothing can be foreseen."""
    match line:
        case Step() if line.done:
            return since_seconds * (line.total - line.done) / line.done
        case _:
            return None


def in_words(seconds: float) -> str:
    """Returns a time such as ``45 s``, ``3 min 20 s`` or ``1 h 05 min``.

    >>> in_words(45.2), in_words(200), in_words(3900)
    ('45 s', '3 min 20 s', '1 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
