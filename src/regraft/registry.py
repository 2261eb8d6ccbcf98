"""One door for built-ins and for packages from outside.

A registry maps a name to a value of one type: criteria, selectors, allocators, adapters, exporters. Built-ins register by
decorator on import; other packages declare an entry point in the group ``regraft.<kind>`` whose object has the same type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from pydantic import AfterValidator

from regraft.errors import InputError, did_you_mean

T = TypeVar("T")


# Where the built-ins of a kind register: imported when somebody asks for the names of that kind and has not imported it.
_HOMES = {
    "criterion": "regraft.importance",
    "selector": "regraft.selection",
    "allocator": "regraft.allocation",
    "adapter": "regraft.adapters",
}
_ALL: dict[str, Registry[Any]] = {}


def registry_of(kind: str) -> Registry[Any]:
    """Returns the registry of a kind with its built-ins in it.

    >>> "taylor" in registry_of("criterion")
    True
    """
    import_module(_HOMES[kind])
    return _ALL[kind]


def known_name(kind: str) -> AfterValidator:
    """Returns a check for a settings field that holds a registered name."""

    def check(value: str) -> str:
        registry_of(kind).get(value)
        return value

    return AfterValidator(check)


class Registry(Generic[T]):
    """Names to values of one kind, with collisions refused.

    Args:
        kind: What the registry holds, in the singular, as users read it ("criterion").
        group: Entry-point group that outside packages use, such as ``regraft.criteria``.

    Example:
        >>> shapes: Registry[int] = Registry("shape", group="regraft.example")
        >>> shapes.add("square", 4)
        4
        >>> shapes.get("squre")
        Traceback (most recent call last):
        ...
        regraft.errors.InputError: unknown shape 'squre'; known: square; did you mean 'square'?
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._values: dict[str, T] = {}
        self._outside_loaded = False
        _ALL[kind] = self

    def add(self, name: str, value: T) -> T:
        """Registers ``value`` under ``name``.

        Raises:
            InputError: The name is taken.
        """
        if name in self._values:
            raise InputError(f"{self.kind} '{name}' is registered twice; rename one of the two")
        self._values[name] = value
        return value

    def register(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers what it decorates."""

        def keep(value: T) -> T:
            return self.add(name, value)

        return keep

    def get(self, name: str) -> T:
        """Returns the value of ``name``.

        Raises:
            InputError: Nothing has this name; the message lists what does.
        """
        self._load_outside()
        if name not in self._values:
            known = ", ".join(sorted(self._values))
            hint = did_you_mean(name, self._values)
            raise InputError(f"unknown {self.kind} '{name}'; known: {known}{hint}")
        return self._values[name]

    def names(self) -> tuple[str, ...]:
        """Returns every registered name, sorted."""
        self._load_outside()
        return tuple(sorted(self._values))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load_outside()
        return name in self._values

    def _load_outside(self) -> None:
        if self._outside_loaded:
            return
        self._outside_loaded = True
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            self.add(point.name, point.load())
