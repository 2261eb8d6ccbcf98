"""Messages of the library in the words of the command line: a setting in backquotes becomes its option."""

from __future__ import annotations

import re

_SETTING = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")
_ONLY_IN_PYTHON = {"tokenizer", "in_place"}


def as_options(message: str) -> str:
    """Returns a message with every setting written as its option; what only a call in Python has stays as it is.

    >>> as_options("`seq_len` 24 exceeds the model's context; `budget=bytes` needs `select=knapsack`, `resume=True` or `merge=False`")
    "--seq-len 24 exceeds the model's context; --budget bytes needs --select knapsack, --resume or --no-merge"
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name in _ONLY_IN_PYTHON:
            return found[0]
        flag = name.replace("_", "-")
        if value in ("True", "False"):
            return f"--{flag}" if value == "True" else f"--no-{flag}"
        return f"--{flag}" if value is None else f"--{flag} {value}"

    return _SETTING.sub(option, message)
