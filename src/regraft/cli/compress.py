"""``regraft compress``: linear layers as two thin ones."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import DryRunOption, ModelArgument, QuietOption, ReportOption, SeedOption, command_line, with_settings
from regraft.cli.progress import progress
from regraft.cli.report import page_beside
from regraft.cli.screen import Screen, saved_to
from regraft.cli.words import as_options
from regraft.errors import InputError, PlanError
from regraft.plans import FactorPlan, RankPlan, from_json, to_json
from regraft.reading import path_of, read_bytes
from regraft.settings import CompressSettings, LoadSettings

if TYPE_CHECKING:
    from regraft.pipelines.compress import CompressResult
    from regraft.pipelines.compress import compress as compress_model
else:
    compress_model = later("regraft.pipelines.compress", "compress")


@with_settings
def compress(
    model: ModelArgument,
    compress: CompressSettings,
    load: LoadSettings,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder to write, which must not exist")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="take the ranks of this plan, of this model or one of the same shape")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="file for plan and figures as JSON; - for the screen")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a search of ranks that was stopped")] = False,
    dry_run: DryRunOption = False,
    report: ReportOption = True,
    quiet: QuietOption = False,
    seed: SeedOption = 0,
) -> None:
    """Replace linear layers by two thin ones, the rank of each chosen under one budget: a smaller file, faster where measured."""
    if output is None and not dry_run:
        raise InputError("--output is missing; say where the compressed model goes, or look first with --dry-run")
    given = None if plan is None else read_plan(plan)
    console, wanted = Screen(), Figures(json)
    with ExitStack() as stack:
        stack.enter_context(wanted.reserved("factorings", "parameters_after"))
        say = stack.enter_context(progress("compressing", quiet=quiet))
        result = compress_model(
            model,
            output,
            compress,
            load=load,
            seed=seed,
            plan=given,
            dry_run=dry_run,
            resume=resume,
            command=command_line(),
            say=say,
        )
        page = page_beside(output, wanted=report and not dry_run)
        wanted.write(to_json(result.as_dict() | {"page": page}))
    if wanted.on_screen:
        return
    _show(console, result)
    console.print("dry run: nothing was written" if dry_run else saved_to(output, page=page), soft_wrap=True)


def read_plan(path: Path) -> FactorPlan | RankPlan:
    """Reads a plan, or what ``--json`` wrote, or for an encoder a rank plan.

    Raises:
        PlanError: It cannot be read.
    """
    text = read_bytes(path_of(path, "plan"), PlanError)
    return from_json(RankPlan if b'"ranks"' in text and b'"factorings"' not in text else FactorPlan, text)


def _show(console: Screen, result: CompressResult) -> None:
    plan = result.plan
    table = Table(title=f"{plan.method}; ranks by {plan.choice}, {plan.layout} layout")
    for heading in ("projection", "factored", "ranks"):
        table.add_column(heading, justify="left" if heading == "projection" else "right")
    for row in result.report.rows:
        table.add_row(row["projection"], str(row["factored"]), row["ranks"])
    console.print(table)
    if result.pruned is not None:
        pruned = result.pruned
        console.print(f"channels first: parameters {pruned.parameters_before:,} -> {pruned.parameters_after:,}", soft_wrap=True)
    console.print(
        f"stored parameters {plan.parameters_before:,} -> {plan.parameters_after:,}: {plan.achieved:.2%} removed "
        f"(asked for: {plan.ratio:.2%})",
        soft_wrap=True,
    )
    if plan.predicted_nats is not None:
        console.print(f"predicted divergence from the dense model: {plan.predicted_nats:.4f} nats per token")
    if result.test is not None:
        before, after = result.test
        console.print(f"test text '{before.text}': {before.loss_nats:.4f} -> {after.loss_nats:.4f} nats per token", soft_wrap=True)
    for note in result.notes:
        console.print(as_options(note), soft_wrap=True)
