"""``regraft allocate``: search a LoRA rank for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.later import later
from regraft.cli.options import ModelArgument, Only, QuietOption, ReportOption, SeedOption, with_settings
from regraft.cli.progress import progress
from regraft.cli.report import page_beside
from regraft.cli.screen import Screen, saved_to
from regraft.cli.words import as_options
from regraft.plans import RankSearch
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
    report: ReportOption = True,
    quiet: QuietOption = False,
    seed: SeedOption = 0,
) -> None:
    """Find a LoRA rank for every layer of a pruned model, under one budget of trainable parameters."""
    console = Screen(highlight=False)
    with progress("searching ranks", quiet=quiet, bar=False) as heard:

        def say(line: str) -> None:
            heard(line)
            if not quiet:
                console.print(as_options(line), style="dim", markup=False, soft_wrap=True)

        found = allocate_ranks(model, output, allocate, recover, load=load, seed=seed, resume=resume, say=say)
        page = page_beside(output.with_suffix(".search"), wanted=report)
    show(console, found.search)
    console.print(f"plan written to {output}", soft_wrap=True, markup=False)
    console.print(saved_to(output.with_suffix(".search"), "everything else is ", page), soft_wrap=True, markup=False)


def show(console: Console, found: RankSearch) -> None:
    """Prints the ranks, the figures of the search and the verdict."""
    table = Table("", "rank", "found")
    for slot, ranks in zip(found.space.slots, found.found, strict=True):
        table.add_row(slot.name, str(found.plan.ranks[slot.modules[0]]), str(ranks))
    console.print(table)
    for line in summary(found):
        console.print(line.removeprefix("- "), soft_wrap=True, markup=False)
    console.print(found.verdict, style="bold", soft_wrap=True, markup=False)
