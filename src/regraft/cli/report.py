"""``regraft report``: the page of a run, or of what a command wrote."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.later import later
from regraft.cli.screen import Screen

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
