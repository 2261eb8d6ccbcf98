"""Messages of the library in the words of the command line: a setting in backquotes becomes its option."""

from __future__ import annotations

import re
from functools import cache

from pydantic.fields import FieldInfo

from regraft.settings import SECTIONS

# Options that commands have beside the settings and that messages of the library name; a command that lacks one never raises these.
OF_COMMANDS = ("check", "dry_run", "output", "plain", "plan", "plan_only", "port", "resume", "seed", "system", "to")
OF_RUN = ("dry_run", "output", "resume")

_SETTING = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def as_options(message: str, *, of_recipe: bool = False) -> str:
    """Returns a message with every setting written as its option; other words in backquotes stay as they are.

    Args:
        message: Text of the library, which names settings in backquotes, with a value or without.
        of_recipe: Whether the settings come from a recipe: there only the options of ``regraft run`` change, and keys keep their names.

    >>> as_options("`seq_len` 24 exceeds the model's context; `budget=bytes` needs `select=knapsack`, `resume=True` or `merge=False`")
    "--seq-len 24 exceeds the model's context; --budget bytes needs --select knapsack, --resume or --no-merge"
    >>> as_options("give `tokenizer`, or `bos=False`; `torch` is missing: `regraft doctor`")
    'give `tokenizer`, or --bos false; `torch` is missing: `regraft doctor`'
    >>> as_options("`lr=0.1` is too high; go on with `resume=True`", of_recipe=True)
    '`lr=0.1` is too high; go on with --resume'
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name in (OF_RUN if of_recipe else OF_COMMANDS):
            return _own(name, value)
        field = None if of_recipe else _fields().get(name)
        return found[0] if field is None else _of_setting(name, value, field) or found[0]

    return _SETTING.sub(option, message)


def flag(name: str) -> str:
    """Returns the option of a setting: ``seq_len`` is ``--seq-len``."""
    return f"--{name.replace('_', '-')}"


@cache
def _fields() -> dict[str, FieldInfo]:
    return {name: field for section in SECTIONS for name, field in section.model_fields.items()}


def _own(name: str, value: str | None) -> str:
    if value in (None, "True"):
        return flag(name)
    return f"--no-{flag(name)[2:]}" if value in ("None", "False") else f"{flag(name)} {value}"


def _of_setting(name: str, value: str | None, field: FieldInfo) -> str:
    """Returns the option of a setting with its value; an empty text for what no option says, such as switching off what is off."""
    if value is None:
        return flag(name)
    if field.annotation is not bool:
        return f"{flag(name)} {value.lower() if value in ('True', 'False') else value}"
    if value == "True":
        return flag(name)
    if value != "False":  # another command has an option of this name that takes a value
        return f"{flag(name)} {value}"
    return f"--no-{flag(name)[2:]}" if field.default else ""
