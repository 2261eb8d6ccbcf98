"""``regraft prune``: make a model smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.options import DryRunOption, ModelArgument, SeedOption, command_line, with_settings
from regraft.errors import InputError
from regraft.groups.declared import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune import plan_summary
from regraft.pipelines.prune import prune as prune_model
from regraft.plans import Groups, PrunePlan
from regraft.settings import LoadSettings, PruneSettings


@with_settings
def prune(
    model: ModelArgument,
    prune: PruneSettings,
    load: LoadSettings,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder to write; must not exist")] = None,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
) -> None:
    """Remove whole heads and feed-forward channels until a share of all parameters is gone."""
    if output is None and not dry_run:
        raise InputError("--output is missing; say where the pruned model goes, or look first with --dry-run")
    console = Console()
    with console.status("pruning") as status:
        result = prune_model(
            model, output, prune, load_settings=load, seed=seed, dry_run=dry_run, command=command_line(), say=status.update
        )
    show_plan(console, discover(ModelView(result.loaded.model)), result.plan)
    console.print("dry run: nothing was written" if dry_run else f"saved to {output}")


def show_plan(console: Console, groups: Groups, plan: PrunePlan) -> None:
    """Prints what a plan removes, layer by layer, and the sizes before and after."""
    table = Table(title=f"{plan.criterion}; selection {plan.selection}, {plan.shape}, aligned to {plan.align}")
    for heading in ("group", "units before", "units after"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for row in plan_summary(groups, plan):
        table.add_row(row["group"], str(row["before"]), str(row["after"]))
    console.print(table)
    console.print(
        f"parameters {plan.parameters_before:,} -> {plan.parameters_after:,}: {plan.achieved:.2%} removed (asked for: {plan.ratio:.2%})"
    )
