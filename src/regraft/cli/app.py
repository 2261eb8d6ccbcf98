"""The program ``regraft``: imports the file of a command, runs it, and turns errors into exit codes.

Exit codes: 0 done; 2 something that the user can mend, said in one line on the standard error; 128 and the number of a signal that
ended the command (130 for Ctrl-C); 70 a fault of ours, in one line that names the file with its full trace.

Commands are imported only when they are called, so that ``--help`` and ``--version`` are fast: most commands need torch.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

import regraft
from regraft.cli.examples import epilog
from regraft.cli.later import later
from regraft.cli.no_memory import is_no_memory, no_memory_line
from regraft.cli.screen import Screen
from regraft.errors import RegraftError, shown
from regraft.signals import exit_code, has_come

if TYPE_CHECKING:
    from regraft.cli.words import as_options
else:
    as_options = later("regraft.cli.words", "as_options")

# The first line of the help of each command in this folder. A test compares this table with the commands.
COMMANDS = {
    "run": "Run a recipe: prune, recover and measure a model, in one folder.",
    "prune": "Remove heads, feed-forward channels, and with --targets more, until a share of all parameters is gone.",
    "compress": "Replace linear layers by two thin ones, the rank of each chosen under one budget: a smaller file, faster where measured.",
    "recover": "Train a small adapter on a pruned model and fold it in: text or instructions, best checkpoint by held-out loss.",
    "evaluate": "Measure a model: loss, perplexity, bits per byte, size and, if asked, speed; on tasks or labels, accuracy.",
    "generate": "Continue a prompt, or answer it if the model has a chat template; the text is shown as it is written.",
    "chat": "Talk to a model in the terminal; its chat template is applied.",
    "export": "Write a model or an adapter for another program, and prove that it computes the same there.",
    "allocate": "Find a LoRA rank for every layer of a pruned model, under one budget of trainable parameters.",
    "meta": "Train a prior for the next search for ranks on past searches.",
    "inspect": "Show the layers of a model, their sizes, what can be pruned, and the parameters.",
    "complete": "Complete a table of ratings by a compressed deep factorization; report held-out errors beside four baselines.",
    "init": "Copy a recipe that comes with regraft, to edit and run; regraft run --list lists them.",
    "schema": "Print the JSON schema of recipes; editors complete and check a recipe by it.",
    "advise": "Say in a second how a model gets under a size, into a memory, or to a speed, and print the command.",
    "report": "Write the page of a run: what was cut, what it cost, every picture, in one file that needs no network.",
    "runs": "List the runs in a folder with their sizes and losses, compare them, or remove one.",
    "studio": "Show the runs of a folder on a local page: compare them, start and stop one, and prompt two models side by side.",
    "doctor": "Show what is installed, what is missing and how to get it.",
}

INTERRUPTED = 130
FAULT = 70  # EX_SOFTWARE
RESUMABLE = ("run", "recover", "allocate")

# Base class of all errors in a command line; typer exports only its subclass.
_USAGE_ERRORS: tuple[type[Exception], ...] = typer.BadParameter.__bases__


class LazyGroup(typer.core.TyperGroup):
    """A group that lists its commands without importing them, and imports only the command that is called."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, Any, list[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the name, the command and the rest of the arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest


def load_command(name: str) -> Any:
    """Imports ``regraft.cli.<name>`` and returns its function of that name as a command."""
    function = getattr(importlib.import_module(f"regraft.cli.{name}"), name)
    alone = typer.Typer(add_completion=False)
    alone.command(name, epilog=epilog(name))(function)
    return typer.main.get_command(alone)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regraft {regraft.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Prune a language model, regrow it low-rank, serve it anywhere."""


def _elsewhere() -> None:
    """Placeholder for a command in the list of commands; :class:`LazyGroup` runs the real command."""
    raise AssertionError("a command was called without being imported")


def build() -> typer.Typer:
    """Returns the application with every command listed."""
    app = typer.Typer(cls=LazyGroup, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        app.command(name, help=summary)(_elsewhere)
    return app


def say_error(error: RegraftError | str) -> None:
    """Prints ``error: …`` on the standard error, never wrapped; red where that is a terminal and colour is wanted."""
    console = Screen(stderr=True, highlight=False, soft_wrap=True)
    with suppress(OSError):  # nobody is there to be told
        console.print("error:", style="bold red", end=" ")
        console.print(str(error))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Args:
        arguments: Arguments without the name of the program; without any, the help is shown.

    Returns:
        The exit code.
    """
    _mend_surroundings()
    try:
        code = typer.main.get_command(build()).main(args=list(arguments) or ["--help"], prog_name="regraft", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of an interrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except RegraftError as error:
        if has_come():  # it is what the interrupt became, such as a worker that ended
            return _interrupted(arguments)
        say_error(as_options(str(error), of_recipe=list(arguments[:1]) == ["run"]))
    except _USAGE_ERRORS as error:
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        context = error.ctx  # pyright: ignore[reportAttributeAccessIssue]
        say_error(f"{shown(message.rstrip('.'), 2000)}; see: {context.command_path if context is not None else 'regraft'} --help")
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(arguments)
    except SystemExit as error:  # how the standard output is given up when its reader has gone
        if error.code in (0, None):
            return 0
        say_error("the standard output was closed before everything was written")
    except Exception as error:
        if has_come():  # a library made something else of it
            return _interrupted(arguments)
        if is_no_memory(error):
            say_error(no_memory_line(error, arguments))
            return 2
        if isinstance(error, OSError):
            say_error(_refused(error))
            return 2
        say_error(
            f"this is a fault of ours: {type(error).__name__}: {shown(error)}; the full trace is in '{_written(error)}': please report it"
        )
        return FAULT
    return 2


def _mend_surroundings() -> None:
    """Makes streams show what their encoding lacks as escapes, and drops sizes of the terminal that are no numbers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("COLUMNS", "LINES"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit() and 0 < int(value[:9]) < 10**5):
            del os.environ[name]


def _refused(error: OSError) -> str:
    """Returns what the operating system refused, in one line."""
    if error.filename is None:
        if error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF):
            return f"the standard output cannot be written: {error.strerror}"
        return f"the operating system refuses: {error.strerror or shown(error)}"
    remedy = "free some space" if is_full(error) else "check the path, its permissions and its length"
    return f"'{shown(error.filename)}': {error.strerror}; {remedy}"


def is_full(error: OSError) -> bool:
    """Returns whether a disk is full, or a quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _interrupted(arguments: Sequence[str]) -> int:
    """Says that a signal ended the command and how to go on, and returns the exit code."""
    say_error(f"interrupted{_how_to_go_on(arguments)}")
    return exit_code()


def _how_to_go_on(arguments: Sequence[str]) -> str:
    command = arguments[0] if arguments else ""
    if command in RESUMABLE:
        return "; the same command with --resume goes on from what is finished"
    if "--memory" in " ".join(arguments):
        return "; the same command goes on from what is finished"
    return "; nothing half-written was left under its final name"


def _written(error: BaseException) -> str:
    """Writes the full trace of a fault to a file and returns its name."""
    import tempfile  # at use, for the sake of --help: it is slow to load

    text = "".join(traceback.format_exception(error))
    try:
        handle, name = tempfile.mkstemp(prefix="regraft-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
    except OSError:
        return "no file: the folder for temporary files cannot be written"
    return name
