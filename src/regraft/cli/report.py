"""``regraft report``: the page of a run, or of what a command wrote."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.later import later
from regraft.cli.screen import Screen
from regraft.cli.words import as_options
from regraft.errors import shown

if TYPE_CHECKING:
    from regraft.pipelines.report import write_page
else:
    write_page = later("regraft.pipelines.report", "write_page")


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="folder of a run, or one that prune, recover, compress or allocate wrote", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="HTML file to write; default: report.html in the folder")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Write the page of a run: what was cut, what it cost, every picture, in one file that needs no network."""
    page = write_page(folder, output)
    Screen().print(f"page written to {page}", soft_wrap=True, markup=False)
    if show:
        webbrowser.open(page.resolve().as_uri())


def page_beside(folder: Path | None, *, wanted: bool) -> Path | None:
    """Writes the page of what a command has written into the same folder.

    The result is whole by then, so that a page that cannot be made is a warning on the standard error and no failure.

    Args:
        folder: What the command wrote; None where it wrote nothing.
        wanted: Whether a page is asked for.

    Returns:
        The page, or None.
    """
    if folder is None or not wanted:
        return None
    try:
        return write_page(folder)
    except Exception as error:  # whatever it is, hours of work are not called failed for it
        line = f"warning: there is no page of the result: {as_options(shown(error, 300))}"
        Screen(stderr=True, highlight=False, soft_wrap=True).print(line, style="yellow")
        return None
