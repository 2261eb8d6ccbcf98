"""``regraft runs``: list, compare and remove runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from regraft.cli.later import later
from regraft.cli.screen import Screen
from regraft.errors import InputError, shown

if TYPE_CHECKING:
    from regraft.pipelines.report import figures_of, list_runs, remove_run, run_named, without_page
else:
    figures_of = later("regraft.pipelines.report", "figures_of")
    list_runs = later("regraft.pipelines.report", "list_runs")
    remove_run = later("regraft.pipelines.report", "remove_run")
    run_named = later("regraft.pipelines.report", "run_named")
    without_page = later("regraft.pipelines.report", "without_page")


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder that holds the runs")] = Path("runs"),
    compare: Annotated[str, typer.Option("--compare", metavar="A,B", help="names of runs; shows all of their models side by side")] = "",
    delete: Annotated[str, typer.Option("--remove", metavar="NAME", help="remove this run and everything in it")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="remove without a question")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON in place of a table")] = False,
) -> None:
    """List the runs in a folder with their sizes and losses, compare them, or remove one."""
    if compare and delete:
        raise InputError("--compare and --remove exclude one another; use one of the two")
    if delete:
        chosen = run_named(folder, delete)
        if not yes and not typer.confirm(f"remove {chosen.path} and everything in it?"):
            raise InputError(f"{chosen.path} was left as it is")
        remove_run(chosen)
        Screen().print(f"removed {chosen.path}", soft_wrap=True, markup=False)
        return
    names = [name.strip() for name in compare.split(",") if name.strip()]
    found = [run_named(folder, name) for name in names] if names else list_runs(folder)
    lines = [line for run in found for line in figures_of(run, every_model=bool(names))]
    if as_json:
        print(json.dumps(lines, indent=2, ensure_ascii=False))
        return
    for path in without_page(folder):
        line = f"note: {shown(path)} has no page; write it by: regraft report {shlex.quote(shown(path))}"
        Screen(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)
    if not found:
        raise InputError(f"'{folder}' holds no runs; make one with: regraft run quickstart")
    table = Table()
    for index, name in enumerate(("run", "model", "parameters", "loss, nats", "against dense", "text")):
        table.add_column(name, justify="left" if index < 2 or index == 5 else "right", overflow="fold")
    for line in lines:
        if line["loss_nats"] is None:
            table.add_row(line["run"], line["model"], "", "", "", "")
        else:
            change = f"{line['change_nats']:+.4f}"
            table.add_row(line["run"], line["model"], f"{line['parameters']:,}", f"{line['loss_nats']:.4f}", change, line["text"])
    Screen().print(table)
