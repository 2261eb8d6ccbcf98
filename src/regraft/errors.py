"""One tree of errors, and one function for everything of others that is shown.

Every error that a user can cause is a :class:`RegraftError`. The command line prints its message as one line and exits with
code 2; anything else is a defect of ours. A message gives the value, the limit and the remedy.

Names, values and texts come from files and arguments that anybody may have written: with escape sequences that repaint a terminal,
with line ends that forge a second message, or a megabyte long. :func:`shown` makes one harmless line of them. Messages of our errors
pass through it as they are made.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_LONGEST_VALUE = 300
_LONGEST_MESSAGE = 2000


def shown(value: object, most: int = _LONGEST_VALUE) -> str:
    r"""Returns a value as one line that is safe to print: control characters escaped, and cut in the middle where it is long.

    >>> shown("a\x1b[31mb\nerror: c")
    'a\\x1b[31mb\\nerror: c'
    >>> shown("x" * 1000, 20)
    'xxxxxxxxxx…xxxxxxxxx'
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"
    if text.isprintable():
        return text
    return "".join(character if _is_harmless(character) else _escaped(character) for character in text)


def harmless(text: str) -> str:
    r"""Returns a text of several lines that is safe to print: control characters escaped, but for line ends and tabs.

    >>> harmless("a\tb\n\x1b[31mc")
    'a\tb\n\\x1b[31mc'
    """
    return "".join(part if part in "\n\t" or part.isprintable() or _is_harmless(part) else _escaped(part) for part in text)


class Markdown(str):
    """A text that is Markdown already, made here of what others wrote."""

    __slots__ = ()


def in_markdown(value: object, most: int = _LONGEST_MESSAGE) -> Markdown:
    r"""Returns a value as words in Markdown that are read as they stand: no HTML, link, image, code or cell of a table begins in them.

    >>> print(in_markdown("<b>[x](http://y) | ![z]`"))
    &lt;b&gt;\[x\](http://y) \| !\[z\]\`
    """
    if isinstance(value, Markdown):
        return value
    text = shown(" ".join(str(value).split("\n")), most).replace("\\", "\\\\")
    for character, instead in {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.items():
        text = text.replace(character, instead)
    for character in "[]|`":
        text = text.replace(character, f"\\{character}")
    return Markdown(f"\\{text}" if text.lstrip()[:1] in tuple("#=~") else text)


def in_code(value: object) -> Markdown:
    """Returns a value as code within a line of Markdown, between more backticks than it has itself.

    >>> print(in_code("a"), in_code("<b> ``c``"))
    `a` ``` <b> ``c`` ```
    """
    text = shown(value, _LONGEST_MESSAGE)
    ticks = "`"
    while ticks in text:
        ticks += "`"
    room = " " if "`" in text or not text.strip() else ""
    return Markdown(f"{ticks}{room}{text}{room}{ticks}")


def _is_harmless(character: str) -> bool:
    """Returns whether a character only shows itself: no control, no line end, no mark of direction, no half of a pair."""
    return character.isprintable() or unicodedata.category(character) in ("Zs", "Co", "Cn")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def kind_of(value: object) -> str:
    """Returns the name of a value's class with its article, for messages.

    >>> kind_of(3), kind_of([])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"an {name}" if name[:1] in tuple("aeioAEIO") else f"a {name}"


class RegraftError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        message: One line; what is not is made so.
    """

    def __init__(self, message: str = "", *rest: object) -> None:
        super().__init__(shown(message, _LONGEST_MESSAGE), *rest)


class InputError(RegraftError, ValueError):
    """A value that cannot be used: a ratio, a rank, a path, a name."""


class ModelError(InputError):
    """A model folder that is missing, damaged, unsafe or of a family that is not known."""


class DataError(InputError):
    """A text or record file that is missing, empty, binary, malformed or too short."""


class PlanError(InputError):
    """A plan that does not fit the model it is applied to."""


class OutputError(RegraftError, OSError):
    """An output that cannot be written: the folder exists, the disk is full, permission is denied."""


class StorageError(RegraftError, RuntimeError):
    """A store of trials that is locked, corrupt or out of reach, or that holds another search."""


class TrainingError(RegraftError, RuntimeError):
    """A training run that cannot go on: the loss is not finite, a checkpoint does not fit."""


class MissingDependencyError(RegraftError, ImportError):
    """A library of an optional extra that is not installed.

    Args:
        library: The name to import.
        extra: The extra of ``regraft`` that brings it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; get it with: pip install 'regraft[{extra}]'")


class ConfigError(InputError):
    """Everything that is wrong with a configuration, listed at once.

    Args:
        source: What was read: a file name or "command line".
        problems: One line for each problem.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(shown(problem, _LONGEST_MESSAGE) for problem in problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            super().__init__(f"{source}: {len(self.problems)} problems")

    def __str__(self) -> str:
        first = super().__str__()
        return first if len(self.problems) == 1 else "\n".join([first, *(f"  - {problem}" for problem in self.problems)])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest known name, or an empty string.

    >>> did_you_mean("tailor", ["taylor", "l1"])
    "; did you mean 'taylor'?"
    >>> did_you_mean("zzz", ["taylor", "l1"])
    ''
    """
    close = get_close_matches(name[:_LONGEST_VALUE], list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
