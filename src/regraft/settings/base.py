"""Base class of all sections of settings, and the kinds of values that several sections have.

Unknown keys are refused and every problem of a section is found at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from regraft.errors import ConfigError, InputError, shown
from regraft.in_short import named
from regraft.reading import is_whole, text_in
from regraft.settings.problems import problems_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _countable(value: int) -> int:
    """Refuses a number of things that nobody counts out: more is a slip of the keyboard."""
    if value > 10**6:
        raise ValueError(f"{value if value < 10**30 else 'a number of more than 30 digits'} is above the limit of 1000000")
    return value


Positive = Annotated[int, Field(gt=0), AfterValidator(_countable)]
Count = Annotated[int, Field(ge=0), AfterValidator(_countable)]
TwoOrMore = Annotated[int, Field(ge=2), AfterValidator(_countable)]

MOST_FACTORS = 1000  # of a completion; its memory and time are proportional to them

# Default lengths of windows in tokens; shorter if the model's context is shorter.
CALIBRATION_TOKENS = 128
TRAINING_TOKENS = 256

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def bytes_in(amount: Any) -> int:
    """Returns an amount of memory in bytes.

    Raises:
        ValueError: The text is not an amount of memory.

    >>> bytes_in("6GB"), bytes_in("1.5 GiB"), bytes_in(1000)
    (6000000000, 1610612736, 1000)
    """
    text = shown(amount, 100) if not is_whole(amount, 10**30, math.inf) else "that number"
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(|[KMGT]|[KMGT]I)B?\s*", text.upper())
    count = int(min(float(found[1]) * _UNITS[found[2]], 1e30)) if found else 0
    if not 1 <= count < 10**18:
        raise ValueError(f"'{text}' is not an amount of memory; write it as 6GB, 512MB or 4GiB")
    return count


def type_name(value: Any) -> Any:
    """Returns the name of a number type, as text or as torch has it: ``torch.bfloat16`` is ``bfloat16``."""
    return str(value).removeprefix("torch.")


def device_name(value: Any) -> Any:
    """Returns the name of a device, as text or as ``device_map`` of transformers has it: None, ``{"": "cpu"}`` or the number of a GPU."""
    match value:
        case None:
            return "auto"
        case {"": only} if len(value) == 1:
            return device_name(only)
        case int() if not isinstance(value, bool):
            return f"cuda:{value}"
        case _:
            return str(value)


def schedule_name(value: Any) -> Any:
    """Returns our name of a learning-rate schedule of transformers; all of ours begin with a warm-up."""
    name = value.value if isinstance(value, Enum) else value
    return "constant" if name == "constant_with_warmup" else name


EVERY_PROJECTION = "all-linear"  # PEFT's word for what is adapted by default


def in_a_list(value: Any) -> Any:
    """Returns a list of one for a single text; ``all-linear`` and None, as PEFT has it, are an empty list."""
    if value in (None, EVERY_PROJECTION, (EVERY_PROJECTION,), [EVERY_PROJECTION]):
        return ()
    return named_alone(value)


def named_alone(value: Any) -> Any:
    """Returns a list of one for a single text."""
    return value if text_in(value) is None else (value,)


def trackers_in(value: Any) -> Any:
    """Returns a list of one for a single text, as the Trainer takes it; ``none`` is an empty list."""
    if value in ("none", ("none",), ["none"]):
        return ()
    return named_alone(value)


Memory = Annotated[int, BeforeValidator(bytes_in)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def options_in(given: Any) -> Any:
    """Returns a mapping, as in recipes, as ``NAME=VALUE`` texts; a list is returned unchanged.

    >>> options_in({"gamma": 0.01, "depth": 3})
    ('gamma=0.01', 'depth=3')
    """
    return tuple(f"{name}={value}" for name, value in given.items()) if isinstance(given, Mapping) else given


def option_values(options: Iterable[str]) -> dict[str, str]:
    """Returns ``NAME=VALUE`` texts as a mapping; the last value of a name counts.

    >>> option_values(("gamma=0.01", "depth=3"))
    {'gamma': '0.01', 'depth': '3'}
    """
    return {name.strip(): value.strip() for name, _, value in (option.partition("=") for option in options)}


Options = Annotated[tuple[str, ...], BeforeValidator(options_in)]


def _takes_bool(annotation: Any) -> bool:
    """Returns whether true and false are among the values of an annotation."""
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))


# Declarations on a field (``json_schema_extra``). The value of a field without a declaration affects the result.
NO_EFFECT: JsonDict = {"affects_result": False}
BY_CONTENT: JsonDict = {"affects_result": "by content"}  # keys of results use a digest of the contents that the field points to

# What the two searches for ranks, of adapters and of compression, say alike.
WORKERS = "number of measuring processes on this machine"
STORAGE = "database for several machines, such as postgresql://user@host/name; default: a file next to the output"
RAY = "Ray cluster for measuring: auto, local or host:port; default: only this machine"


class Settings(BaseModel):
    """Base class of all sections: frozen, and refusing unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True)
    # Words that PEFT and transformers have for a setting, each with the name that it has here; taken wherever settings are given.
    aliases: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # the signature that type checkers see is that of the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(type(self).__name__, problems_of(error, type(self))) from None

        # pydantic calls this as its own __init__ only when asked to make one section; nested sections are checked as data.
        __init__.__pydantic_base_init__ = True

        def __setattr__(self, name: str, value: Any) -> None:
            kind = type(self).__name__
            raise InputError(f"{kind} does not change; make another by {kind}({shown(name, 80)}=...), or give the setting as a keyword")

    def __repr__(self) -> str:
        """Returns the settings that were given and are not the defaults, in one short line."""
        shown = {name: field for name, field in type(self).model_fields.items() if field.repr and name in self.model_fields_set}
        given = {name: getattr(self, name) for name in shown}
        return named(type(self).__name__, {name: value for name, value in given.items() if value != shown[name].default})

    __str__ = __repr__

    @classmethod
    def words(cls) -> dict[str, str]:
        """Returns every word for a setting with the setting's name: the names themselves, and what other libraries call them."""
        return {name: name for name in cls.model_fields} | dict(cls.aliases)

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        named: dict[str, Any] = {}
        words: dict[str, str] = {}
        for word, value in values.items():
            name = cls.aliases.get(word, word)
            if name in named:
                raise ValueError(f"{words[name]} and {word} are one setting; give one of the two")
            named[name], words[name] = value, word
        return named

    @field_validator("*", mode="before")
    @classmethod
    def _of_a_kind(cls, value: Any, about: ValidationInfo) -> Any:
        """Refuses what pydantic takes for something else: a name with a zero byte, and true for the number 1."""
        match value:
            case str() | PurePath() if "\0" in str(value):
                raise ValueError(f"'{shown(value, 80)}' has a zero byte, which no name has; choose another")
            case bool() if about.field_name is not None and not _takes_bool(cls.model_fields[about.field_name].annotation):
                raise ValueError(f"{str(value).lower()} is no number and no text")
            case _:
                return value

    def decisive(self, *, varied: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the values that affect the result, as plain JSON types: all fields except those declared otherwise.

        Args:
            varied: Fields that the caller sets itself, independently of the settings.
        """
        declared = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        others = {name for name, extra in declared.items() if extra in (NO_EFFECT, BY_CONTENT)}
        return self.model_dump(mode="json", exclude=others | set(varied))
