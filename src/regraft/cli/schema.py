"""``regraft schema``: the JSON schema of recipes, by which editors complete and check them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.atomic import json_with, reserved_file, write_text
from regraft.cli.later import later
from regraft.cli.screen import Screen
from regraft.errors import shown

if TYPE_CHECKING:
    from regraft.pipelines.run.recipe import recipe_schema
else:
    recipe_schema = later("regraft.pipelines.run.recipe", "recipe_schema")


def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="file to write; default: the screen")] = None,
) -> None:
    """Print the JSON schema of recipes; editors complete and check a recipe by it."""
    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
        return
    with reserved_file(output, json_with("$schema", "properties")):
        write_text(output, text)
    name = shown(output)
    Screen().print(f"written to {name}; first line of a recipe: # yaml-language-server: $schema={name}", soft_wrap=True, markup=False)
