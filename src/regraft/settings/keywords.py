"""Settings as plain keywords of a call: sorted into their sections, checked, and shown in the call's signature."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast, overload

from pydantic import ValidationError

from regraft.errors import ConfigError, InputError, did_you_mean, kind_of, shown
from regraft.reading import LARGEST_SEED, path_of, whole_number
from regraft.settings.base import Settings
from regraft.settings.measuring import EvaluateSettings
from regraft.settings.problems import problems_of
from regraft.settings.sections import LoadSettings, RecoverSettings

A = TypeVar("A", bound=Settings)
B = TypeVar("B", bound=Settings)
C = TypeVar("C", bound=Settings)
F = TypeVar("F", bound=Callable[..., Any])

TEXT_WORDS = ("calibration", "data", "text")  # what calls have for their text, each by what it is for


@overload
def with_keywords(call: str, keywords: Mapping[str, Any], first: A, /) -> tuple[A]: ...
@overload
def with_keywords(call: str, keywords: Mapping[str, Any], first: A, second: B, /) -> tuple[A, B]: ...
@overload
def with_keywords(call: str, keywords: Mapping[str, Any], first: A, second: B, third: C, /) -> tuple[A, B, C]: ...
def with_keywords(call: str, keywords: Mapping[str, Any], /, *sections: Settings) -> tuple[Settings, ...]:
    """Returns sections with the values that keywords give: each belongs to the first section that has a setting of that name.

    Args:
        call: Name of the function, for messages.
        keywords: Names of settings, or the words that PEFT and transformers have for them, to values.
        sections: What holds where no keyword says otherwise.

    Raises:
        ConfigError: A keyword is not known or a value cannot be; everything is listed, unknown names with a suggestion.
    """
    values: dict[int, dict[str, Any]] = {index: {} for index in range(len(sections))}
    problems: list[str] = []
    for name, value in keywords.items():
        owner = next((index for index, section in enumerate(sections) if name in section.words()), None)
        if owner is None:
            problems.append(f"{name}: unknown keyword{_instead(name, sections)}")
        else:
            values[owner][name] = value
    built: list[Settings] = []
    for index, section in enumerate(sections):
        try:
            built.append(_changed(section, values[index]))
        except ValidationError as error:
            problems += problems_of(error, type(section))
    if problems:
        raise ConfigError(call, problems)
    return tuple(built)


def _instead(name: str, sections: Sequence[Settings]) -> str:
    """Returns what to give in place of an unknown keyword: the call's own word for its text, the closest name, or all names."""
    known = [word for section in sections for word in section.words()]
    fields = dict.fromkeys(word for section in sections for word in type(section).model_fields)
    own = next((word for word in fields if word in TEXT_WORDS), None)
    if own is not None and (name in TEXT_WORDS or "dataset" in name):
        return f"; the text of this call is `{own}`"
    return did_you_mean(name, known) or "; known: " + ", ".join(fields)


def _changed(section: Settings, values: Mapping[str, Any]) -> Settings:
    if not values:
        return section
    spoken_of = {section.words()[name] for name in values}
    kept = {name: getattr(section, name) for name in section.model_fields_set if name not in spoken_of}
    return type(section).model_validate(kept | dict(values))


def takes_settings(*kinds: type[Settings], plan: Any = object) -> Callable[[F], F]:
    """Shows the settings among the parameters of a function that takes them as ``**keywords``, and checks what it is called with.

    Args:
        *kinds: The sections, first the one that ``settings`` is.
        plan: What ``plan`` may be, where the function has such a parameter: a class, or several with ``|``.
    """

    def shown(function: F) -> F:
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in own}
        fields = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items() if name not in taken}
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
            for name, field in fields.items()
        ]

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            given = dict(zip(signature.parameters, arguments, strict=False)) | keywords
            _check_call(given, kinds[0] if kinds else None)
            if "plan" in given and not isinstance(given["plan"], plan):
                raise InputError(f"`plan` is {kind_of(given['plan'])}; give the `plan` of a result, or what `regraft.read_plan` returns")
            if "output" in given and given["output"] is None and signature.parameters["output"].default is inspect.Parameter.empty:
                raise InputError("`output` is None; give the name of a new folder")
            return function(*arguments, **keywords)

        call.__signature__ = signature.replace(parameters=[*own, *more])  # pyright: ignore[reportAttributeAccessIssue]
        return cast(F, call)

    return shown


def _check_call(given: Mapping[str, Any], kind: type[Settings] | None) -> None:
    """Checks the arguments that every public call has: the seed, paths of outputs, and sections of settings.

    Args:
        given: Names of parameters to what they were called with.
        kind: The section that ``settings`` is; None where the function checks that itself.

    Raises:
        InputError: One is of another kind; the message says which is wanted.
    """
    for name in ("output", "settings", "plan", "recover"):
        if _is_tokenizer(given.get(name)):
            raise InputError(f"`{name}` is {kind_of(given[name])}; a tokenizer is given by its name: tokenizer=...")
    for name in ("in_place", "dry_run", "resume", "replace"):
        if not isinstance(given.get(name, False), bool):
            raise InputError(f"`{name}` is {shown(repr(given[name]), 80)}; give True or False")
    for name in ("say", "progress"):
        if name in given and not callable(given[name]):
            raise InputError(f"`{name}` is {shown(repr(given[name]), 80)}; give a function that takes a line, such as print")
    if "seed" in given:
        whole_number(given["seed"], "`seed`", 0, LARGEST_SEED)
    for name in ("output", "work", "folder"):
        value = given.get(name)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise InputError(f"`{name}` is {kind_of(value)}, no path; give a text or a pathlib.Path")
        if value is not None:
            path_of(value, name)
    sections = (("settings", kind), ("load", LoadSettings), ("recover", RecoverSettings), ("evaluate", EvaluateSettings))
    for name, wanted in sections:
        value = given.get(name)
        if value is not None and wanted is not None and not isinstance(value, wanted):
            raise InputError(f"`{name}` is {kind_of(value)}; give {wanted.__name__}(...), or single settings as keywords")


def _is_tokenizer(value: object) -> bool:
    """Returns whether a value is a tokenizer of transformers, which is not imported for this."""
    return any(base.__name__ == "PreTrainedTokenizerBase" for base in type(value).__mro__)
