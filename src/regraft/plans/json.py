"""Conversion between plans and JSON text."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from regraft.errors import PlanError

T = TypeVar("T")


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(value: Any, indent: int | None = 2) -> str:
    """Returns the JSON text of a plan; :func:`from_json` reads it back to an equal value."""
    return _adapter(cast("type[Any]", type(value))).dump_json(value, indent=indent).decode()


def to_dict(value: Any) -> dict[str, Any]:
    """Returns a plan as plain JSON types."""
    return json.loads(to_json(value, indent=None))


def from_json(kind: type[T], text: str | bytes) -> T:
    """Reads a plan of type ``kind``.

    Raises:
        PlanError: The text is not JSON or does not describe such a plan; the message names the first field at fault.
    """
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole text"
        raise PlanError(f"not a {kind.__name__}: {where}: {first['msg']}; write it again with regraft") from None
