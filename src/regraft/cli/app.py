"""The program ``regraft``: imports the file of a command, runs it, and turns errors into exit codes.

Exit codes: 0 success; 2 an error that the user can correct, with one line on the standard error; 130 interrupted. Any other error is
a defect of the program and shows its traceback.

Commands are imported only when they are called, so that ``--help`` and ``--version`` are fast: most commands need torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from rich.console import Console

from regraft.cli.words import as_options
from regraft.errors import RegraftError

# The first line of the help of each command in this folder. A test compares this table with the commands.
COMMANDS = {
    "run": "Run a recipe: prune, recover and measure a model, in one folder.",
    "prune": "Remove heads, feed-forward channels, and with --targets more, until a share of all parameters is gone.",
    "compress": "Replace linear layers by two thin ones, the rank of each chosen under one budget: a smaller file, faster where measured.",
    "recover": "Train a small adapter on a pruned model and fold it in: text or instructions, best checkpoint by held-out loss.",
    "evaluate": "Measure a model: loss, perplexity, bits per byte, size and, if asked, speed; of one for labels, accuracy or correlation.",
    "generate": "Continue a prompt, or answer it where the model has a chat template, as it is written.",
    "chat": "Talk to a model in the terminal; its chat template is applied.",
    "export": "Write a model or an adapter for another program, and prove that it computes the same there.",
    "allocate": "Find a LoRA rank for every layer of a pruned model, under one budget of trainable parameters.",
    "meta": "Train the start of the next search for ranks on past ones.",
    "inspect": "Show the layers of a model, their sizes, what can be pruned, and the parameters.",
    "complete": "Complete a table of ratings by a compressed deep factorization; report held-out errors beside four baselines.",
    "doctor": "Show what is installed, what is missing and how to get it.",
}

INTERRUPTED = 130

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
    alone.command(name)(function)
    return typer.main.get_command(alone)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regraft {version('regraft')}")
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
    """Prints ``error: …`` on the standard error without wrapping; in red on a terminal with colours."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(str(error))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line.

    Args:
        arguments: Arguments without the name of the program; without any, the help is shown.

    Returns:
        The exit code.
    """
    try:
        code = typer.main.get_command(build()).main(args=list(arguments) or ["--help"], prog_name="regraft", standalone_mode=False)
    except RegraftError as error:
        # A recipe has keys and no options: there a setting keeps its name.
        say_error(str(error) if list(arguments[:1]) == ["run"] else as_options(str(error)))
        return 2
    except _USAGE_ERRORS as error:
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        context = error.ctx  # pyright: ignore[reportAttributeAccessIssue]
        say_error(f"{message.rstrip('.')}; see: {context.command_path if context is not None else 'regraft'} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        say_error("interrupted")
    return code if isinstance(code, int) else 0


def main() -> None:
    """Runs the command line of this process and exits."""
    sys.exit(run(sys.argv[1:]))
