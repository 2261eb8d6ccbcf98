"""One door for built-ins and for packages from outside.

A registry maps a name to a value of one type: criteria, selectors, allocators, adapters, compressors, exporters. Built-ins are listed in
``built_in.toml`` with the module that registers each, which is imported when the method is asked for. Other packages declare an entry point
in the group ``regraft.<kind>`` whose object has the same type. An entry point that cannot be used is
reported with its name and its package, and left out: what else is installed goes on working.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from typing import Any, Generic, Protocol, TypeVar

from pydantic import AfterValidator

from regraft.errors import InputError, did_you_mean, kind_of, shown
from regraft.reading import text_in

LOG = logging.getLogger(__name__)


class Named(Protocol):
    """Anything that says its own name."""

    @property
    def name(self) -> str:
        """Name, as on the command line."""
        ...


N = TypeVar("N", bound=Named)
T = TypeVar("T")


# The rooms that make the registries.
_HOMES = {
    "criterion": "regraft.importance",
    "selector": "regraft.selection",
    "allocator": "regraft.allocation",
    "adapter": "regraft.adapters",
    "compression method": "regraft.compression",
    "choice of ranks": "regraft.compression",
    "export format": "regraft.export",
}
_ALL: dict[str, Registry[Any]] = {}


@cache
def built_in(kind: str) -> Mapping[str, str]:
    """Returns the built-in methods of a kind, each with the module that registers it; nothing is imported.

    >>> built_in("selector")["global"]
    'regraft.selection.global_threshold'
    """
    return _built_in().get(kind, {})


@cache
def _built_in() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads((files("regraft") / "built_in.toml").read_text(encoding="utf-8"))


def listed(kind: str, *, also: Sequence[str] = (), without: Collection[str] = ()) -> str:
    """Returns the names of the built-in methods of a kind in words, for help texts.

    >>> words = listed("selector", also=("none",), without=("global",))
    >>> words.endswith(" or none"), "uniform" in words, "global" in words
    (True, True, False)
    """
    names = [name for name in (*built_in(kind), *also) if name not in without]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def registry_of(kind: str) -> Registry[Any]:
    """Returns the registry of a kind.

    >>> "taylor" in registry_of("criterion")
    True
    """
    import_module(_HOMES[kind])
    return _ALL[kind]


def known_name(
    kind: str, *also: str, unfit: Mapping[str, str] | None = None, why_unfit: Callable[[Any], str] = lambda value: ""
) -> AfterValidator:
    """Returns a check for a settings field that holds a registered name.

    Args:
        kind: Kind of the registry.
        also: Further words that the field takes, such as ``auto``.
        unfit: Built-in names that this field does not take, each with the reason in words; they are not listed as known.
        why_unfit: Returns the reason for which this field does not take what an outside package brings, or nothing.
    """
    taken = built_in(kind).keys() - (unfit or {}).keys()

    def check(value: str) -> str:
        if value in also or value in taken:
            return value
        registry = registry_of(kind)
        reasons = dict(unfit or {}) | {name: why for name, found in registry.outside().items() if (why := why_unfit(found))}
        if value in reasons:
            names = [name for name in (*also, *registry) if name not in reasons]
            raise InputError(f"{kind} '{value}' {reasons[value]}; use one of {', '.join(names)}")
        registry.check(value, also, reasons)
        return value

    return AfterValidator(check)


class Registry(Generic[T]):
    """Names to values of one kind, with collisions refused.

    Args:
        kind: What the registry holds, in the singular, as users read it ("criterion").
        group: Entry-point group that outside packages use, such as ``regraft.criteria``.
        of: What an outside value must be an instance of; None: anything.

    Example:
        >>> shapes: Registry[int] = Registry("shape", group="regraft.example")
        >>> shapes.add("square", 4)
        4
        >>> shapes.get("squre")
        Traceback (most recent call last):
        ...
        regraft.errors.InputError: unknown shape 'squre'; known: square; did you mean 'square'?
    """

    def __init__(self, kind: str, group: str, of: type | tuple[type, ...] | None = None) -> None:
        self.kind = kind
        self.group = group
        self._of = of
        self._values: dict[str, T] = {}
        self._broken: dict[str, str] = {}
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
            InputError: Nothing has this name; the message lists what does, or says why the entry point of this name is left out.
        """
        self.check(name)
        if name not in self._values:
            import_module(built_in(self.kind)[name])
        return self._values[name]

    def check(self, name: str, also: Collection[str] = (), unlisted: Collection[str] = ()) -> None:
        """Checks that something has this name.

        Args:
            name: The name.
            also: Further words that are listed with the names, such as ``auto``.
            unlisted: Names that the message does not list.

        Raises:
            InputError: Nothing has this name; the message lists what does, or says why the entry point of this name is left out.
        """
        known = {*self.names(), *also}
        listed = sorted(known - {*unlisted})
        if text_in(name) is None:
            raise InputError(f"the name of the {self.kind} is {kind_of(name)}; known: {', '.join(listed)}")
        if name in known:
            return
        if name in self._broken:
            raise InputError(self._broken[name])
        raise InputError(f"unknown {self.kind} '{name}'; known: {', '.join(listed)}{did_you_mean(name, listed)}")

    def names(self) -> tuple[str, ...]:
        """Returns every name, sorted."""
        self._load_outside()
        return tuple(sorted({*self._values, *built_in(self.kind)}))

    def outside(self) -> dict[str, T]:
        """Returns what is no built-in, by name."""
        self._load_outside()
        return {name: value for name, value in self._values.items() if name not in built_in(self.kind)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def broken(self) -> dict[str, str]:
        """Returns why each entry point that cannot be used is left out, by its name."""
        self._load_outside()
        return dict(self._broken)

    def _load_outside(self) -> None:
        if self._outside_loaded:
            return
        self._outside_loaded = True
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            if reason := self._cannot_use(point):
                package = f" of package '{point.dist.name}'" if point.dist is not None else ""
                self._broken[point.name] = (
                    f"{self.kind} '{point.name}'{package} is left out: {reason}; update or uninstall what brings it ({point.value})"
                )
                LOG.warning("%s", shown(self._broken[point.name]))

    def _cannot_use(self, point: EntryPoint) -> str:
        """Registers what an entry point brings; returns why it cannot, in a few words, or nothing."""
        try:
            value = point.load()
        except Exception as error:  # code of others: whatever it raises is its own affair
            return f"loading it raises {type(error).__name__}: {error}"
        if self._of is not None and not isinstance(value, self._of):
            kinds = self._of if isinstance(self._of, tuple) else (self._of,)
            return f"it is a {type(value).__name__} and not a {' or '.join(kind.__name__ for kind in kinds)}"
        try:
            name = self._name_of(value)
        except AttributeError:
            return f"it is a {type(value).__name__} without a name"
        if name not in ("", point.name):
            return f"it calls itself '{name}'"
        if point.name in self._values or point.name in built_in(self.kind):
            return "the name is taken"
        self._values[point.name] = value
        return ""

    def _name_of(self, value: T) -> str:
        """Returns what a value calls itself; nothing where values of this kind have no name of their own."""
        return ""


class NamedRegistry(Registry[N]):
    """A registry of values that say their own name, so that it is written once.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Shape:
        ...     name: str
        >>> shapes: NamedRegistry[Shape] = NamedRegistry("shape", group="regraft.example")
        >>> shapes.include(Shape("square"))
        Shape(name='square')
        >>> shapes.names()
        ('square',)
    """

    def include(self, value: N) -> N:
        """Registers a value under the name that it says.

        Raises:
            InputError: The name is taken.
        """
        return self.add(value.name, value)

    def _name_of(self, value: N) -> str:
        return value.name
