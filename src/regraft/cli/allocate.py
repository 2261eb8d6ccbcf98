"""``regraft allocate``: search a LoRA rank for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import JsonOption, ModelArgument, Only, QuietOption, ReportOption, SeedOption, with_settings
from regraft.cli.progress import progress
from regraft.cli.report import page_beside
from regraft.cli.screen import Screen, saved_to
from regraft.cli.words import as_options
from regraft.plans import RankSearch, to_dict, to_json
from regraft.report.ranks import summary
from regraft.settings import AllocateSettings, LoadSettings, RecoverSettings

if TYPE_CHECKING:
    from regraft.pipelines.ranks.allocate import allocate_ranks
else:
    allocate_ranks = later("regraft.pipelines.ranks.allocate", "allocate_ranks")

RECOVERY = Only(
    (
        "data",
        "adapter",
        "teacher",
        "distill",
        "temperature",
        "dropout",
        "lr",
        "lr_ratio",
        "steps",
        "batch",
        "accumulate",
        "seq_len",
        "packing",
        "prompt",
        "truncation",
        "skip_bad",
        "schedule",
        "warmup",
        "max_grad_norm",
        "eval_every",
        "held_out",
        "held_out_windows",
        "precision",
    )
)


@with_settings
def allocate(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="rank plan to write, such as plan.json")],
    allocate: AllocateSettings,
    recover: Annotated[RecoverSettings, RECOVERY],
    load: LoadSettings,
    resume: Annotated[bool, typer.Option("--resume", help="resume a stopped search, or join one in a shared storage")] = False,
    json_file: JsonOption = None,
    report: ReportOption = True,
    quiet: QuietOption = False,
    seed: SeedOption = 0,
) -> None:
    """Find a LoRA rank for every layer of a pruned model, under one budget of trainable parameters."""
    console, wanted = Screen(highlight=False), Figures(json_file)
    with wanted.reserved("verdict", "ranks", "trainable_parameters"), progress("searching ranks", quiet=quiet, bar=False) as heard:

        def say(line: str) -> None:
            heard(line)
            if not (quiet or wanted.on_screen):
                console.print(as_options(line), style="dim", markup=False, soft_wrap=True)

        found = allocate_ranks(model, output, allocate, recover, load=load, seed=seed, resume=resume, say=say)
        page = page_beside(output.with_suffix(".search"), wanted=report)
        wanted.write(to_json(figures(found.search) | {"plan": output, "page": page}))
    if wanted.on_screen:
        return
    show(console, found.search)
    console.print(f"plan written to {output}", soft_wrap=True, markup=False)
    console.print(saved_to(output.with_suffix(".search"), "everything else is ", page), soft_wrap=True, markup=False)


def figures(found: RankSearch) -> dict[str, Any]:
    """Returns the ranks of a search, what it measured and what that is worth, as plain JSON types."""
    return {
        "verdict": found.verdict,
        "method": found.plan.method,
        "trainable_parameters": found.plan.trainable_parameters,
        "budget": found.space.budget,
        "uniform": found.space.uniform,
        "ranks": dict(found.plan.ranks),
        "found": {slot.name: rank for slot, rank in zip(found.space.slots, found.found, strict=True)},
        "trials": len(found.trials),
        "failed": sum(trial.loss_nats is None for trial in found.trials),
        "search_cost": found.search_cost,
        "confirming_cost": found.confirming_cost,
        "confirmation": None if found.confirmation is None else to_dict(found.confirmation),
        "error": None if found.error is None else to_dict(found.error),
        "agreement": found.agreement,
    }


def show(console: Console, found: RankSearch) -> None:
    """Prints the ranks, the figures of the search and the verdict."""
    table = Table("", "rank", "found")
    for slot, ranks in zip(found.space.slots, found.found, strict=True):
        table.add_row(slot.name, str(found.plan.ranks[slot.modules[0]]), str(ranks))
    console.print(table)
    for line in summary(found):
        console.print(line.removeprefix("- "), soft_wrap=True, markup=False)
    console.print(found.verdict, style="bold", soft_wrap=True, markup=False)
