"""``regraft init``: a recipe of one's own, to edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.atomic import reserved_file, write_text
from regraft.cli.later import later
from regraft.cli.screen import Screen
from regraft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from regraft.pipelines.run.recipe import shipped_recipes
else:
    shipped_recipes = later("regraft.pipelines.run.recipe", "shipped_recipes")


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of a recipe that comes with regraft, such as quickstart")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="file to write; default: NAME.yaml here")] = None,
) -> None:
    """Copy a recipe that comes with regraft, to edit and run; regraft run --list lists them."""
    known = shipped_recipes()
    if name not in known:
        raise InputError(f"there is no recipe '{name}'; known: {', '.join(known)}{did_you_mean(name, known)}")
    file = output if output is not None else Path(f"{name}.yaml")
    with reserved_file(file):
        write_text(file, known[name].read_text(encoding="utf-8"))
    Screen().print(f"written to {file}; run it with: regraft run {file}", soft_wrap=True, markup=False)
