"""Problems with settings in plain words: one line for each wrong value, instead of pydantic's types and locations."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from regraft.errors import ConfigError, did_you_mean
from regraft.reading import is_whole, text_in

S = TypeVar("S", bound=BaseModel)


def checked(kind: type[S], values: Mapping[str, Any], source: str) -> S:
    """Builds a section from plain values.

    Args:
        kind: The section's class.
        values: Values from the user.
        source: Origin of the values, for the message.

    Raises:
        ConfigError: At least one value is wrong; all problems are listed, unknown keys with a suggestion.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(source, problems_of(error, kind)) from None


def problems_of(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Returns one line for each wrong value: its name, the allowed values, the given value, and a suggestion for a misspelt name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for problem in error.errors(include_url=False):
        found.setdefault(_where(problem["loc"], kind), []).append(dict(problem))
    return [_line(where, problems, kind) for where, problems in found.items()]


def _where(location: Sequence[str | int], kind: type[BaseModel]) -> str:
    """Returns the dotted name of a value, without pydantic's names for the members of a union."""
    parts: list[str] = []
    section: type[BaseModel] | None = kind
    for part in location:
        if section is not None:
            parts.append(str(part))
            field = section.model_fields.get(str(part))
            section = _section_of(field.annotation) if field is not None else None
        elif is_whole(part, 0, math.inf):
            parts.append(str(part))
    return ".".join(parts)


def _line(where: str, problems: Sequence[dict[str, Any]], kind: type[BaseModel]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(kind, first["loc"][:-1]))
        hint = did_you_mean(str(first["loc"][-1]), known) or (f"; known: {', '.join(known)}" if known else "; there are none to set")
        return f"{where}: unknown key{hint}"
    if first["type"] == "missing":
        return f"{where}: required, but not given"
    got = f"(got {reprlib.repr(first['input'])})"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"] or not where or isinstance(first["input"], Mapping):  # of a whole section
            return f"{where}: {message}" if where else message
        return f"{where}: {message}" if f"'{first['input']}'" in message else f"{where}: {message} {got}"
    limits = _limits(kind, where) if first["type"] in _OUT_OF_RANGE else ""
    wanted = [limits] if limits else [_wanted(problem) for problem in problems if problem["type"] not in _OF_FIELDS] or ["another value"]
    choices = re.findall(r"'([^']*)'", " ".join(str(problem.get("ctx", {}).get("expected", "")) for problem in problems))
    hint = did_you_mean(text_in(first["input"]) or "", choices)
    return f"{where}: should be {' or '.join(dict.fromkeys(wanted))} {got}{hint}"


_OF_FIELDS = ("missing", "unexpected_keyword_argument")  # of a plan that a value of another kind was tried as
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_PLAIN_WORDS = {
    "model_type": "keys and values",
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "tuple": "a list",
    "path": "a file name",
}


def _wanted(problem: dict[str, Any]) -> str:
    """Returns the expected kind of a value in plain words."""
    kind: str = problem["type"]
    if kind == "dataclass_type":
        return f"a {problem['ctx']['class_name']}"
    plain = _PLAIN_WORDS.get(kind) or _PLAIN_WORDS.get(kind.partition("_")[0])
    return plain or problem["msg"].removeprefix("Input should be ")


def _limits(kind: type[BaseModel], where: str) -> str:
    """Returns all limits of a number, such as "above 0.0 and below 1.0"."""
    *sections, name = where.split(".")
    field = _section_at(kind, sections).model_fields.get(name)
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    constraints = field.metadata if field is not None else []
    return " and ".join(
        f"{word} {getattr(constraint, limit)}"
        for constraint in constraints
        for limit, word in words.items()
        if getattr(constraint, limit, None) is not None
    )


def _fields_at(kind: type[BaseModel], location: Iterable[str | int]) -> Iterable[str]:
    """Returns the field names of the section that a location points into."""
    return _section_at(kind, location).model_fields


def _section_at(kind: type[BaseModel], location: Iterable[str | int]) -> type[BaseModel]:
    """Returns the section that a location points into."""
    current = kind
    for part in location:
        field = current.model_fields.get(str(part))
        nested = _section_of(field.annotation) if field is not None else None
        if nested is None:
            return current
        current = nested
    return current


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the settings class in an annotation such as ``PruneSettings | None``."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
