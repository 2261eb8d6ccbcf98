"""Messages of the library name settings in backquotes; the command line writes them as the options that its commands have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regraft.cli.app import COMMANDS, load_command
from regraft.cli.words import OF_COMMANDS, OF_RUN, as_options
from regraft.settings import SECTIONS

SOURCE = Path(__file__).parents[3] / "src" / "regraft"
FIELDS = {name: field for section in SECTIONS for name, field in section.model_fields.items()}

# Text with an option that no `as_options` sees, each with the reason.
SPOKEN_BY_PROGRAMS = {
    "the same command with --resume goes on from what is finished": "written to the terminal by the handler of a signal",
    "pip install --force-reinstall --no-deps ": "a command of pip, printed as it is to be typed",
}


def options(command: str) -> dict[str, Any]:
    """The options of a command by the names of their parameters."""
    return {option.name: option for option in load_command(command).params if option.param_type_name == "option"}


def settings_of(command: str) -> dict[str, Any]:
    return {name: option for name, option in options(command).items() if name in FIELDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_setting_becomes_the_option_that_the_command_has(command: str) -> None:
    for name, option in settings_of(command).items():
        assert as_options(f"raise `{name}` at once") == f"raise {option.opts[0]} at once"
        if option.is_flag:
            assert as_options(f"`{name}=True`") == option.opts[0]
            off = as_options(f"`{name}=False`")
            assert off == (option.secondary_opts[0] if option.secondary_opts else f"`{name}=False`"), off
        else:
            assert as_options(f"use `{name}=a-value,b=1`, or none") == f"use {option.opts[0]} a-value,b=1, or none"


def test_the_commands_have_settings_to_name() -> None:
    """The control of the test above: it is not true of nothing."""
    assert sum(len(settings_of(command)) for command in COMMANDS) > 150
    flags = {name for command in COMMANDS for name, option in settings_of(command).items() if option.secondary_opts}
    assert {"merge", "biases"} <= flags
    assert {"seq_len", "bos", "load_in_4bit"} <= set(FIELDS)


@pytest.mark.slow
def test_options_beside_the_settings() -> None:
    every = {name for command in COMMANDS for name in options(command)}
    assert set(OF_COMMANDS) <= every
    for name in OF_COMMANDS:
        assert as_options(f"`{name}`") in {option.opts[0] for command in COMMANDS for option in options(command).values()}
    assert as_options("`check=None` keeps the file; `to=gguf`") == "--no-check keeps the file; --to gguf"
    assert "--no-check" in options("export")["no_check"].opts


def test_a_value_of_two_words_and_a_choice_that_is_a_boolean_too() -> None:
    assert as_options("`bos=True` or `bos=False`") == "--bos true or --bos false"
    assert as_options("`layers=1:-1` names `model.layers`") == "--layers 1:-1 names `model.layers`"


@pytest.mark.parametrize(
    "text",
    ["`tokenizer`", "`in_place=True`", "`model`", "`regraft export ADAPTER --to merged`", "`Ratio`", "`seq-len`", "``seq_len``x", "ratio"],
)
def test_what_is_no_setting_stays(text: str) -> None:
    given = f"give {text} to it"
    assert as_options(given).replace("`--seq-len`", "``seq_len``") == given


def test_a_recipe_keeps_its_keys() -> None:
    said = as_options("`seq_len=4` is short; choose another `output`, or `resume=True`", of_recipe=True)
    assert said == "`seq_len=4` is short; choose another --output, or --resume"
    assert set(OF_RUN) <= set(options("run"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_line_of_help_stands_alone(command: str) -> None:
    """It begins with what the value is or what the option does, not with one of the values, "how" or a word that needs another line."""
    for name, option in options(command).items():
        if name == "help" or option.hidden:
            continue
        assert option.help is not None, name
        first = re.split(r"[ :,;]", option.help)[0]
        assert first.lower() not in {"how", "whether", "which", "this", "it", "its", "of", "as", "auto", "0", "none"}, (
            f"{name}: {option.help}"
        )
        assert len(option.help.split()) > 1, f"{name}: {option.help}"
        choices = (option.metavar or "").strip("[],…").split("|")
        assert len(choices) < 2 or first not in choices, f"{name}: {option.help}"


WHOLE_COMMAND = re.compile(r"`(regraft|ray|accelerate|torchrun|vllm|transformers) [^`]*`")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of every string that is no docstring; a value in an f-string is one character."""
    ours = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ours) and node.body and isinstance(node.body[0], ast.Expr):
            parts.add(id(node.body[0].value))
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            yield node.lineno, "".join(str(value.value) if isinstance(value, ast.Constant) else "·" for value in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def options_named(source: str) -> list[str]:
    found = ((line, WHOLE_COMMAND.sub("", text).rstrip("·"), text) for line, text in texts(ast.parse(source)))
    return [f"line {line}: {text}" for line, plain, text in found if OPTION.search(plain) and plain not in SPOKEN_BY_PROGRAMS]


# The studio starts commands, and so writes their options.
ELSEWHERE = ("cli", "studio", "__pycache__", "recipes")


@pytest.mark.parametrize("room", sorted({path.name for path in SOURCE.iterdir() if path.name not in ELSEWHERE}))
def test_the_library_names_settings_and_no_options(room: str) -> None:
    place = SOURCE / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.suffix == ".py" else []
    found = [f"{file.relative_to(SOURCE)}, {text}" for file in files for text in options_named(file.read_text(encoding="utf-8"))]
    assert found == [], "write the name of the setting in backquotes; the command line makes an option of it"


def test_an_option_in_a_message_is_found() -> None:
    """The control: plain text, an f-string, a constant of its own; not a docstring and not a whole command."""
    source = '"""Of --ratio."""\nA = "lower --ratio"\nraise E(f"{a} is high; " f"lower --seq-len {b}")\nraise E("`regraft run --list`")\n'
    assert options_named(source) == ["line 2: lower --ratio", "line 3: · is high; lower --seq-len ·"]
