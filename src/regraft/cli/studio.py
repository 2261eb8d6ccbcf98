"""``regraft studio``: runs on a local page."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft import signals
from regraft.cli.later import later
from regraft.cli.screen import Screen
from regraft.errors import InputError
from regraft.reading import is_folder, is_there

if TYPE_CHECKING:
    from regraft.studio.server import serving
else:
    serving = later("regraft.studio.server", "serving")


def studio(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder that holds the runs; it need not be there yet")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="port on 127.0.0.1; 0: a free one")] = 8737,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Show the runs of a folder on a local page: compare them, start and stop one, and prompt two models side by side."""
    if is_there(folder) and not is_folder(folder):
        raise InputError(f"'{folder}' is no folder; give the folder that holds the runs, such as runs")
    screen = Screen(highlight=False, soft_wrap=True)
    with serving(folder, port) as server:
        screen.print(f"studio of {folder}: {server.address}")
        screen.print("the address holds a secret: whoever has it can start runs as you; end with Ctrl-C")
        if show:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            ended = server.studio.jobs.stop_all()
            for job in ended:
                again = f"; go on: regraft {' '.join(job.arguments)} --resume" if job.arguments[0] == "run" else ""
                screen.print(f"stopped {job.title}{again}")
            raise typer.Exit(signals.exit_code()) from None
