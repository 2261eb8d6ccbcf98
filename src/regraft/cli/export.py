"""``regraft export``: write an adapter in a form that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from regraft.cli.options import OutputOption, command_line, with_settings
from regraft.pipelines.export import export_adapter
from regraft.settings import LoadSettings


@with_settings
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="the folder of an adapter, ours or PEFT's", show_default=False)],
    output: OutputOption,
    load: LoadSettings,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="peft-lora: what PEFT and servers load; merged: the model with it folded in")
    ] = "peft-lora",
) -> None:
    """Write an adapter as a plain LoRA that stock PEFT and strict servers load, without loss."""
    result = export_adapter(adapter, output, to, load=load, command=command_line())
    Console().print(f"{result.words} written to {output}", soft_wrap=True, markup=False, highlight=False)
