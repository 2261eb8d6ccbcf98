"""Command-line options, generated from the sections of :mod:`regraft.settings`, so that names, defaults and help are written once.

A command has a section as a parameter, and the decorator replaces it by the section's fields::

    @with_settings
    def prune(model: ModelArgument, output: OutputOption, prune: PruneSettings, load: LoadSettings, seed: SeedOption = 0) -> None:
        \"\"\"Cut heads and FFN channels.\"\"\"

    app.command()(prune)     # --ratio --criterion … --seq-len … --trust-remote-code/--no-trust-remote-code

``seq_len`` becomes ``--seq-len``; a bool becomes ``--merge/--no-merge``, or ``--speed`` alone when it is off by default; a tuple
is repeatable and takes commas, ``--targets heads,ffn``. Options that are not given are not set in the section, which knows its defaults.
The words of other libraries (``Settings.aliases``) are options too, which the help leaves out: ``--learning-rate`` is ``--lr``. The command
gets the sections built and checked; all problems, of all sections, are in one :class:`~regraft.errors.ConfigError` that names the options.
"""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from regraft.cli.words import as_options, flag
from regraft.errors import ConfigError
from regraft.settings import Memory, Settings, problems_of

SOURCE = "command line"
CONTEXT = "context_of_the_call"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a model folder, a hub id, or: seedling", show_default=False)]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder to write, which must not exist")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="seed of all random draws", min=0, max=2**32 - 1)]
QuietOption = Annotated[bool, typer.Option("--quiet", help="show no progress")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="file for the figures as JSON; - for the screen")]
ReportOption = Annotated[
    bool,
    typer.Option(
        "--report/--no-report", envvar="REGRAFT_REPORT", help="write the page report.html, about 2 MB, into the folder of the result"
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="print the plan and the sizes before and after, and write nothing")]


@dataclass(frozen=True)
class Only:
    """Annotation of a section: the command has options only for these fields; the others keep their defaults."""

    fields: tuple[str, ...]


def command_line() -> str:
    """Returns the command as the user typed it, for the provenance of its results."""
    return shlex.join(["regraft", *sys.argv[1:]])


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces every parameter of a command that is a section of settings by one option for each of its fields.

    Args:
        command: A function whose parameters are annotated. Those annotated with a subclass of ``Settings`` must have no default.

    Returns:
        A function for ``typer.Typer.command``: the same name and help, with the sections' options at the end.

    Raises:
        ConfigError: Raised when the command is called with wrong values; all of them are listed.
    """
    hints = get_type_hints(command, include_extras=True)
    own: list[inspect.Parameter] = []
    sections: dict[str, type[Settings]] = {}
    wanted: dict[str, tuple[str, ...]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        section, *notes = get_args(kind) if get_origin(kind) is Annotated else (kind,)
        if isinstance(section, type) and issubclass(section, Settings):
            sections[parameter.name] = section
            only = next((note.fields for note in notes if isinstance(note, Only)), None)
            wanted[parameter.name] = only if only is not None else tuple(section.model_fields)
        else:
            own.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    options = [_parameter(name, kind.model_fields[name], kind) for section, kind in sections.items() for name in wanted[section]]
    taken = {parameter.name for parameter in (*own, *options)}
    words = {section: _other_words(kind, wanted[section], taken) for section, kind in sections.items()}
    hidden = {word: sections[section].model_fields[name] for section in sections for word, name in words[section].items()}
    options += [_hidden(word, field) for word, field in hidden.items()]  # one for all sections that have the word
    parameters = [inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context), *own, *options]
    names = [parameter.name for parameter in parameters]
    assert len(set(names)) == len(names), f"options of {command.__name__} collide: {sorted(names)}"

    @wraps(command)
    def wrapper(**given: Any) -> None:
        context: typer.Context = given.pop(CONTEXT)
        typed = {name: value for name, value in given.items() if _was_given(context, name)}
        built = _build(sections, {section: {name: name for name in wanted[section]} | words[section] for section in sections}, typed)
        command(**{name: _without_dots(name, given[name]) for name in (parameter.name for parameter in own) if name in given}, **built)

    wrapper.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    # typer resolves annotations of what it wraps; the wrapper's own are already types.
    del wrapper.__wrapped__
    return wrapper


def _without_dots(name: str, value: Any) -> Any:
    """Returns an output without ``..``: of ``new/../out`` the folder ``new`` is not there any more when the output is."""
    if name != "output" or not isinstance(value, Path) or ".." not in value.parts or "\0" in str(value):
        return value
    return Path(os.path.realpath(value))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _other_words(section: type[Settings], wanted: tuple[str, ...], taken: set[str]) -> dict[str, str]:
    """Returns the words of other libraries for the wanted fields, each with its field, except those that are options already."""
    return {word: name for word, name in section.aliases.items() if name in wanted and word not in taken}


def _build(sections: dict[str, type[Settings]], words: dict[str, dict[str, str]], given: dict[str, Any]) -> dict[str, Settings]:
    """Builds the sections from the options that were given, by the fields' own names or by other words for them."""
    built: dict[str, Settings] = {}
    problems: list[str] = []
    for section, kind in sections.items():
        values: dict[str, Any] = {}
        by: dict[str, str] = {}
        for word, name in words[section].items():
            if given.get(word) is None:
                continue
            if name in by:
                problems.append(f"{flag(by[name])} and {flag(word)} are one setting; give one of the two")
            values[name], by[name] = _plain(given[word]), word
        try:
            built[section] = kind.model_validate(values)
        except ValidationError as error:
            problems += [_as_option(problem) for problem in problems_of(error, kind)]
    if problems:
        raise ConfigError(SOURCE, list(dict.fromkeys(problems)))
    return built


def _as_option(problem: str) -> str:
    """Replaces the field name at the start of a problem by the name of its option."""
    field, colon, rest = problem.partition(":")
    return f"{flag(field.split('.')[0])}{colon}{rest}"


def _plain(value: Any) -> Any:
    """Splits values such as ``heads,ffn`` of repeatable options; all other values remain text, which the section parses."""
    if isinstance(value, list | tuple):
        return tuple(part.strip() for text in value for part in _split(str(text)) if part.strip())
    return value


def _split(text: str) -> list[str]:
    r"""Returns the parts of a text between commas; those within brackets belong to a regular expression.

    >>> _split(r"q_proj,.*[.]\d{1,2}[.](q|v)_proj")
    ['q_proj', '.*[.]\\d{1,2}[.](q|v)_proj']
    """
    depth, parts = 0, [""]
    for character in text:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        parts[-1] += "" if character == "," and not depth else character
        if character == "," and not depth:
            parts.append("")
    return parts if not depth else text.split(",")


def _parameter(name: str, field: FieldInfo, section: type[Settings]) -> inspect.Parameter:
    """Makes the option of one field. Values remain text, which the section parses, so that all problems are found together."""
    word, default, text = flag(name), field.default, as_options(field.description or "")
    kind: Any
    if field.annotation is bool:
        kind = bool
        option = typer.Option(f"{word}/--no-{word[2:]}" if default else word, help=text, rich_help_panel=_panel(section))
    else:
        kind = list[str] if get_origin(field.annotation) is tuple else str
        metavar = _placeholder(field)
        option = typer.Option(word, metavar=metavar, help=text, rich_help_panel=_panel(section))
        if field.is_required():
            default = inspect.Parameter.empty
        elif default in (None, "", ()):
            default, kind = None, kind | None
        else:
            default = [str(part) for part in default] if isinstance(default, tuple) else str(default)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _hidden(word: str, field: FieldInfo) -> inspect.Parameter:
    """Makes an option that the help does not list, for another word for a field that is no switch."""
    assert field.annotation is not bool, f"{word}: a switch has one name"
    kind = list[str] if get_origin(field.annotation) is tuple else str
    option = typer.Option(flag(word), hidden=True)
    return inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _panel(section: type[Settings]) -> str:
    return section.__name__.removesuffix("Settings")


def _placeholder(field: FieldInfo) -> str:
    """Returns the placeholder of a field's value in the help: DIR for a folder, SIZE for an amount of memory, else by its type."""
    if (field.description or "").startswith("folder"):
        return "DIR"
    return "SIZE" if Memory in get_args(field.annotation) else _metavar(field.annotation)


def _metavar(annotation: Any) -> str:
    """Returns the placeholder of a type's values in the help: the choices, N, X, FILE or TEXT."""
    if get_origin(annotation) is Literal:
        return "[" + "|".join(str(choice) for choice in get_args(annotation)) + "]"
    if get_origin(annotation) is tuple:
        return _metavar(get_args(annotation)[0]) + ",…"
    if get_origin(annotation) is Annotated:
        return _metavar(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        # A plan can be given as a value in Python and in a recipe; on the command line it is a file.
        parts = [part for part in get_args(annotation) if part is not NoneType and not is_dataclass(part)]
        return "|".join(dict.fromkeys(_metavar(part).strip("[]") for part in parts))
    plain = {bool: "true|false", int: "N", float: "X", Path: "FILE", str: "TEXT"}
    return plain.get(annotation, "VALUE")
