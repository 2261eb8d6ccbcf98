"""``regraft run``: run all stages of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import DryRunOption, JsonOption, QuietOption
from regraft.cli.progress import progress
from regraft.cli.prune import figures as plan_figures
from regraft.cli.prune import show_plan
from regraft.cli.screen import Screen, saying
from regraft.errors import InputError
from regraft.plans import to_dict, to_json
from regraft.report.page import screen_table
from regraft.report.summary import caption, scaled, speed_note, won_back

if TYPE_CHECKING:
    from regraft.evaluation.harness import flat
    from regraft.pipelines.run.recipe import read_recipe, shipped_recipes, to_yaml
    from regraft.pipelines.run.run import RunResult
    from regraft.pipelines.run.run import run as run_recipe
else:
    flat = later("regraft.evaluation.harness", "flat")
    read_recipe = later("regraft.pipelines.run.recipe", "read_recipe")
    shipped_recipes = later("regraft.pipelines.run.recipe", "shipped_recipes")
    to_yaml = later("regraft.pipelines.run.recipe", "to_yaml")
    run_recipe = later("regraft.pipelines.run.run", "run")


def run(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="recipe: a YAML file, or the name of a recipe that comes with regraft", show_default=False),
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="changes to the recipe, such as prune.ratio=0.3", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder of the run; default: runs/ and the recipe's name")
    ] = None,
    dry_run: DryRunOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="resume a stopped run after its last finished stage")] = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
    show_list: Annotated[bool, typer.Option("--list", help="list the recipes that come with regraft")] = False,
) -> None:
    """Run a recipe: prune, recover and measure a model, in one folder."""
    console = Screen(highlight=False, soft_wrap=True)
    if show_list:
        _show_recipes(console)
        return
    if not recipe:
        raise InputError(f"no recipe was given; give a YAML file or one of: {', '.join(shipped_recipes())}")
    status, wanted = console.status(""), Figures(json_file)
    silent = quiet or wanted.on_screen
    with wanted.reserved("folder", "measurements"), progress("running the recipe", quiet=quiet, bar=False) as heard:

        def say(line: str) -> None:
            heard(line)  # what is repeated meanwhile belongs to this stage
            status.stop()
            if not silent:
                console.print(line, style="dim", markup=False)

        def advance(line: str) -> None:
            heard(line)
            if not silent:
                saying(status)(line)
                status.start()

        try:
            result = run_recipe(recipe, output, overrides=overrides or [], resume=resume, dry_run=dry_run, say=say, progress=advance)
        finally:
            status.stop()
        wanted.write(to_json(figures(result)))
    if wanted.on_screen:
        return
    if dry_run:
        _show_dry_run(console, result)
    else:
        _show_result(console, result)


def figures(result: RunResult) -> dict[str, Any]:
    """Returns what a run measured and decided, as plain JSON types; after a dry run the sizes and the plan."""
    report = result.report
    won = None if report is None else won_back(report.measurements)
    return {
        "folder": result.path,
        "measurements": [] if report is None else [flat(entry) for entry in report.measurements],
        "sizes": {label: to_dict(size) for label, size in result.sizes.items()},
        "plan": None if result.plan is None else plan_figures(result.groups, result.plan),
        "verdict": None if report is None or report.ranks is None else report.ranks.verdict,
        "won_back": None if won is None else {"cost_nats": won.cost_nats, "gain_nats": won.gain_nats, "share": won.share},
        "page": None if result.path is None else result.path / "report.html",
    }


def _show_recipes(console: Console) -> None:
    for name, path in shipped_recipes().items():
        console.print(f"{name}: {read_recipe(name).description} ({path})", markup=False)


def _show_dry_run(console: Console, result: RunResult) -> None:
    console.print(to_yaml(result.recipe), markup=False, end="")
    if result.plan is not None:
        show_plan(console, result.groups, result.plan)
    table = Table("", "parameters", "in memory", "MACs a token")
    for label, size in result.sizes.items():
        table.add_row(label, f"{size.parameters:,}", scaled(size.bytes_in_memory, "B"), scaled(size.macs_per_token, ""))
    console.print(table)
    console.print("dry run: nothing was written")


def _show_result(console: Console, result: RunResult) -> None:
    report = result.report
    assert report is not None
    for label, text in report.samples.items():
        console.print(f"\n{label} writes:", style="bold", markup=False)
        console.print(text, markup=False)
    console.print(screen_table(report.measurements))
    console.print(caption(report.measurements), style="dim", markup=False)
    if speed_note(report.measurements):
        console.print(speed_note(report.measurements), style="dim", markup=False)
    if report.ranks is not None:
        console.print(report.ranks.verdict, markup=False)
    won = won_back(report.measurements)
    if won is not None:
        console.print(won.sentence(), style="bold", markup=False)
    console.print(f"everything is in {result.path}; its page is {result.path}/report.html", markup=False)
