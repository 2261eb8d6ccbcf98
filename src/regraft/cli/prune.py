"""``regraft prune``: make a model smaller."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import DryRunOption, JsonOption, ModelArgument, QuietOption, ReportOption, SeedOption, command_line, with_settings
from regraft.cli.progress import progress
from regraft.cli.report import page_beside
from regraft.cli.screen import Screen, saved_to
from regraft.cli.words import as_options
from regraft.errors import InputError
from regraft.pipelines.prune.plan_files import plan_path, read_plan, reserved_plan, write_plan
from regraft.plans import Groups, PrunePlan, to_json
from regraft.progress import Say
from regraft.settings import LoadSettings, PruneSettings

if TYPE_CHECKING:
    from regraft.pipelines.export_model import takes
    from regraft.pipelines.prune.prune import prune as prune_model
    from regraft.pipelines.prune.prune import replay
    from regraft.pipelines.prune.result import PruneResult
    from regraft.pipelines.prune.summary import collapsed, plan_summary, why_kept
else:
    takes = later("regraft.pipelines.export_model", "takes")
    collapsed = later("regraft.pipelines.prune.summary", "collapsed")
    plan_summary = later("regraft.pipelines.prune.summary", "plan_summary")
    why_kept = later("regraft.pipelines.prune.summary", "why_kept")
    replay = later("regraft.pipelines.prune.prune", "replay")
    prune_model = later("regraft.pipelines.prune.prune", "prune")

OWN_CLASS = """{why}: transformers loads it after `import regraft` or with trust_remote_code=True. What knows stock classes
alone does not: the models that vLLM and SGLang bring, llama.cpp's converter, most other servers and converters. For these:"""
UNEVEN_REMEDIES = {
    "hf-uniform": "  regraft export {folder} --to hf-uniform --output DIR    a stock class, filled up with zeros to equal layers",
    "gguf": "  regraft export {folder} --to gguf --output FILE.gguf    llama.cpp, layers as they are",
}
EQUAL_LAYERS = "  regraft prune with --shape uniform, the default         equal layers from the start"
EVEN_REMEDY = "  regraft prune with --targets ffn    leaves heads alone, whose number the stock class derives from the width"


@with_settings
def prune(
    model: ModelArgument,
    prune: PruneSettings,
    load: LoadSettings,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder to write, which must not exist")] = None,
    dry_run: DryRunOption = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="write only the plan: to --output if that ends in .json, else to plan.json in that folder")
    ] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="prune by this plan, with the settings and the seed stored in it")
    ] = None,
    json_file: JsonOption = None,
    report: ReportOption = True,
    quiet: QuietOption = False,
    seed: SeedOption = 0,
) -> None:
    """Remove heads, feed-forward channels, and with --targets more, until a share of all parameters is gone."""
    if output is None and not dry_run:
        raise InputError("--output is missing; say where the pruned model goes, or look first with --dry-run")
    if plan_only and plan is not None:
        raise InputError(f"--plan-only makes a plan, and --plan {plan} brings one; use one of the two")
    console, wanted = Screen(), Figures(json_file)
    with ExitStack() as stack:
        stack.enter_context(wanted.reserved("parameters_before", "parameters_after", "groups"))
        say = stack.enter_context(progress("pruning", quiet=quiet))
        stack.enter_context(reserved_plan(output if plan_only else None))
        common: Common = {"load": load, "seed": seed, "command": command_line(), "say": say}
        if plan is not None:
            result = replay(model, read_plan(plan), output, prune, dry_run=dry_run, **common)
        else:
            result = prune_model(model, output, prune, dry_run=dry_run or plan_only, **common)
        if plan_only and output is not None and not dry_run:
            write_plan(result.plan, output)
        page = page_beside(output, wanted=report and not (dry_run or plan_only))
        wanted.write(to_json(figures(result.groups, result.plan) | {"notes": list(result.notes), "page": page}))
    if wanted.on_screen:
        return
    show_plan(console, result.groups, result.plan)
    for note in result.notes:
        console.print(as_options(note), soft_wrap=True, markup=False)
    if dry_run:
        console.print("dry run: nothing was written")
    elif plan_only and output is not None:
        console.print(f"plan written to {plan_path(output)}", soft_wrap=True, markup=False)
    else:
        console.print(saved_to(output, page=page), soft_wrap=True, markup=False)
        if output is not None:
            console.print(*who_cannot_load(output, result), sep="\n", end="", soft_wrap=True, markup=False)


def who_cannot_load(folder: Path, result: PruneResult) -> list[str]:
    """Returns lines on the programs that cannot load a saved model and the commands that help; none if it is of a stock class.

    Args:
        folder: The folder.
        result: What was saved. Commands that refuse its model are left out, where there is one in memory.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not str(config["model_type"]).startswith("regraft_"):
        return []
    if not config.get("per_layer_config"):
        why = "its layers are equal, but have sizes that the stock class of its family cannot hold"
        return [OWN_CLASS.format(why=why), EVEN_REMEDY, ""]
    loaded = None if result.model is None else replace(result.loaded, model=result.model, tokenizer=result.tokenizer)
    remedies = [line.format(folder=folder) for to, line in UNEVEN_REMEDIES.items() if loaded is None or takes(to, loaded)]
    return [OWN_CLASS.format(why="its layers differ in size"), *remedies, EQUAL_LAYERS, ""]


def figures(groups: Groups, plan: PrunePlan) -> dict[str, Any]:
    """Returns the sizes of a pruning and how its plan was made, as plain JSON types."""
    return {
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "ratio": plan.ratio,
        "achieved": plan.achieved,
        "criterion": plan.criterion,
        "selection": plan.selection,
        "shape": plan.shape,
        "align": plan.align,
        "groups": plan_summary(groups, plan),
        "kept": list(why_kept(groups, plan)),
    }


class Common(TypedDict):
    """Common arguments for making a plan and for replaying one."""

    load: LoadSettings
    seed: int
    command: str
    say: Say


def show_plan(console: Console, groups: Groups, plan: PrunePlan) -> None:
    """Prints the sizes before and after, equal layers in one row, and why a kind of unit loses nothing."""
    table = Table(title=f"{plan.criterion}; selection {plan.selection}, {plan.shape}, aligned to {plan.align}")
    for heading in ("group", "units before", "units after"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for names, before, after in collapsed(plan_summary(groups, plan)):
        table.add_row(names, str(before), str(after))
    console.print(table)
    for line in why_kept(groups, plan):
        console.print(line, soft_wrap=True, markup=False)
    unit = plan.made_with.get("settings", {}).get("budget", "parameters")
    asked = f"{plan.ratio:.2%}" + (f" of the {unit}" if unit != "parameters" else "")
    console.print(f"parameters {plan.parameters_before:,} -> {plan.parameters_after:,}: {plan.achieved:.2%} removed (asked for: {asked})")
