"""The one place that prints: whatever is shown is text, never markup, and no control character reaches the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from regraft.errors import shown
from regraft.progress import Say

_LONGEST_LINE = 4000


def visible(text: str) -> str:
    """Returns text whose lines are each safe to print.

    >>> visible("a b")
    'a b'
    """
    return "\n".join(shown(line.expandtabs(8), _LONGEST_LINE) for line in text.split("\n"))


def saved_to(folder: object, what: str = "", page: Path | None = None) -> str:
    """Returns the line that says where something was saved, and its page, or the command that makes one.

    >>> saved_to("my model", "adapter ")
    "adapter saved to my model; a page of it: regraft report 'my model' --open"
    >>> saved_to("pruned", page=Path("pruned/report.html"))
    'saved to pruned; its page: pruned/report.html'
    """
    if page is not None:
        return f"{what}saved to {folder}; its page: {page}"
    return f"{what}saved to {folder}; a page of it: regraft report {shlex.quote(str(folder))} --open"


class Screen(Console):
    """A console for names and texts of others.

    Args:
        stderr: The standard error in place of the standard output.
        highlight: Whether numbers and paths are coloured on a terminal.
        soft_wrap: Whether lines are left as long as they are.
    """

    def __init__(self, *, stderr: bool = False, highlight: bool = True, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=highlight, soft_wrap=soft_wrap, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns text to be printed, in tables and titles too; square brackets are square brackets."""
        plain: dict[str, Any] = how | {"markup": False, "emoji": False}
        return super().render_str(visible(text), **plain)


def saying(status: Status) -> Say:
    """Returns what shows a line in a status, which would read it as markup."""
    return lambda line: status.update(Text(visible(line)))
