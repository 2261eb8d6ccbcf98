"""``regraft doctor``: check the installation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from regraft.cli.screen import Screen
from regraft.pipelines.doctor import Finding, examine

_COLOURS = {"ok": "green", "missing": "yellow", "outdated": "red", "damaged": "red", "none": "dim"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a list")] = False) -> None:
    """Show what is installed, what is missing and how to get it."""
    examination = examine()
    if as_json:
        print(json.dumps(examination.to_dict(), indent=2))
    else:
        console = Screen(highlight=False, soft_wrap=True)
        _show(console, "needed", [*examination.required, examination.model])
        _show(console, "optional", examination.optional)
        _show(console, "machine", examination.machine)
        console.print("everything that is needed is there" if examination.healthy else "something that is needed is not there")
    if not examination.healthy:
        raise typer.Exit(1)


def _show(console: Console, title: str, findings: Sequence[Finding]) -> None:
    """Prints one line for each finding, without wrapping, so that remedies can be copied."""
    console.print(title, style="bold")
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        colour = "red" if finding.required and finding.status == "missing" else _COLOURS[finding.status]
        remedy = f"; get it with: {finding.remedy}" if finding.remedy else ""
        console.print(Text.assemble(f"  {finding.name:<{width}}  ", (f"{finding.status:<8}", colour), f"  {finding.value}{remedy}"))
    console.print()
