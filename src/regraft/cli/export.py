"""``regraft export``: write a model or an adapter in a form that other programs read, and compare it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import JsonOption, OutputOption, QuietOption, command_line, with_settings
from regraft.cli.progress import progress
from regraft.cli.screen import Screen
from regraft.cli.words import as_options
from regraft.errors import InputError
from regraft.plans import to_dict, to_json
from regraft.settings import ExportSettings, LoadSettings

if TYPE_CHECKING:
    from regraft.pipelines.export import ExportResult
    from regraft.pipelines.export import export as export_to
else:
    export_to = later("regraft.pipelines.export", "export")

FORMATS = "hf, hf-uniform, gguf, ollama, nemotron-nas: whole models; peft-lora, merged: adapters"


@with_settings
def export(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="a model folder, a GGUF file, a hub id, or the folder of an adapter", show_default=False),
    ],
    output: OutputOption,
    settings: ExportSettings,
    load: LoadSettings,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=FORMATS)] = "peft-lora",
    check: Annotated[
        str,
        typer.Option("--check", metavar="TEXT", help="text of the comparison, or a file of it; default: text that the model writes itself"),
    ] = "",
    no_check: Annotated[bool, typer.Option("--no-check", help="do not compare the result in its runtime")] = False,
    push_to_hub: Annotated[
        str, typer.Option("--push-to-hub", metavar="NAME/MODEL", help="then commit the folder to this repository on the Hugging Face hub")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="with --push-to-hub: a new repository is private")] = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write a model or an adapter for another program, and prove that it computes the same there."""
    if no_check and check:
        raise InputError("`check` gives the text of a comparison that `check=None` leaves out; give one of them")
    text = None if no_check else check
    source_path: str | Path = Path(source) if Path(source).expanduser().exists() else source
    wanted = Figures(json_file)
    with wanted.reserved("words", "modules", "rank", "parity"), progress("exporting", quiet=quiet):
        result = export_to(source_path, output, to, settings=settings, load=load, check=text, command=command_line())
        wanted.write(to_json(figures(result)))
    console = Screen(stderr=wanted.on_screen)
    for line in (f"{result.words} written to {output}", *(f"note: {as_options(note)}" for note in result.notes)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if result.parity is not None:
        console.print(result.parity.words(), soft_wrap=True, markup=False, highlight=False)
    if push_to_hub:
        with progress("uploading", quiet=quiet):
            address = result.push_to_hub(push_to_hub, private=private or None, token=load.token)
        console.print(f"committed to {address}", soft_wrap=True, markup=False, highlight=False)


def figures(result: ExportResult) -> dict[str, Any]:
    """Returns what was written and how it compares in its runtime, as plain JSON types."""
    parity = None if result.parity is None else to_dict(result.parity)
    return {"words": result.words, "modules": result.modules, "rank": result.rank, "notes": list(result.notes), "parity": parity}
