"""One tree of errors.

Every error that a user can cause is a :class:`RegraftError`. The command line prints its message as one line and exits with
code 2; anything else is a defect of ours and keeps its traceback. A message gives the value, the limit and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class RegraftError(Exception):
    """Base of every error that a user can cause and mend."""


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
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{source}: {len(self.problems)} problems\n{lines}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the closest known name, or an empty string.

    >>> did_you_mean("tailor", ["taylor", "l1"])
    "; did you mean 'taylor'?"
    >>> did_you_mean("zzz", ["taylor", "l1"])
    ''
    """
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
