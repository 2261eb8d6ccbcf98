"""``regraft recover``: recover the quality of a pruned model by training."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import JsonOption, ModelArgument, OutputOption, ReportOption, SeedOption, command_line, with_settings
from regraft.cli.progress import progress
from regraft.cli.report import page_beside
from regraft.cli.screen import Screen, saved_to
from regraft.cli.words import as_options
from regraft.plans import LOSS_UNITS, to_json
from regraft.settings import LoadSettings, RecoverSettings

if TYPE_CHECKING:
    from regraft.pipelines.recover import recover_model
    from regraft.training.distributed import is_main
    from regraft.training.recover import Recovered
else:
    recover_model = later("regraft.pipelines.recover", "recover_model")
    is_main = later("regraft.training.distributed", "is_main")


@with_settings
def recover(
    model: ModelArgument,
    output: OutputOption,
    recover: RecoverSettings,
    load: LoadSettings,
    resume: Annotated[bool, typer.Option("--resume", help="resume a stopped run from its checkpoints")] = False,
    json_file: JsonOption = None,
    report: ReportOption = True,
    seed: SeedOption = 0,
) -> None:
    """Train a small adapter on a pruned model and fold it in: text or instructions, best checkpoint by held-out loss."""
    wanted = Figures(json_file if is_main() else None)
    reserved = wanted.reserved("first_loss", "best_loss", "best_step")
    with reserved, progress("recovering" if recover.quiet else "preparing to train", quiet=recover.quiet or not is_main()) as say:
        result = recover_model(model, output, recover, load=load, seed=seed, resume=resume, command=recorded(command_line()), say=say)
        if not is_main():
            return
        page = page_beside(output, wanted=report)
        wanted.write(to_json(figures(result.recovered, LOSS_UNITS[recover.task], result.judged) | {"page": page}))
    if wanted.on_screen:
        return
    console = Screen()
    if result.finished_before:
        console.print(f"{output} was finished before, with the same settings, seed and source; nothing is left to do", soft_wrap=True)
        return
    show(console, result.recovered, LOSS_UNITS[recover.task], result.judged)
    for line in result.recovered.data.lines():
        console.print(as_options(line), soft_wrap=True, style="yellow" if line.startswith("warning") else None)
    what = "model" if result.recovered.injected is None else "adapter"
    console.print(saved_to(output, f"{what} ", page), soft_wrap=True)


def recorded(command: str) -> str:
    """Returns a command without ``--resume``, which does not change the result.

    >>> recorded("regraft recover pruned --output out --resume --steps 9")
    'regraft recover pruned --output out --steps 9'
    """
    return shlex.join(part for part in shlex.split(command) if part != "--resume")


def figures(recovered: Recovered, unit: str, judged: Mapping[str, float]) -> dict[str, Any]:
    """Returns the losses of a recovery and what it took, as plain JSON types; a measure that is not defined is null."""
    return {
        "first_loss": recovered.first_loss,
        "best_loss": recovered.best_loss,
        "unit": unit,
        "best_step": recovered.best_step,
        "steps": recovered.log[-1].step,
        "lr": None if recovered.rates is None else recovered.rates.best,
        "trainable_parameters": recovered.trainable_parameters,
        "seconds": recovered.seconds,
        "peak_memory_bytes": recovered.peak_memory_bytes,
        **judged,
    }


def show(console: Console, recovered: Recovered, unit: str, judged: Mapping[str, float]) -> None:
    """Prints the losses of a recovery in their unit, and the measures on held-out labelled rows."""
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    steps = recovered.log[-1].step
    table.add_row("held-out loss before", f"{recovered.first_loss:.4f} {unit}")
    table.add_row("held-out loss after", f"{recovered.best_loss:.4f} {unit}")
    for name, value in judged.items():
        table.add_row(f"held-out {name.replace('_', ' ')}", f"{value:.4f}")
    table.add_row("best step", f"{recovered.best_step} of {steps}")
    if recovered.rates is not None:
        table.add_row("learning rate", f"{recovered.rates.best:g}, the best of {len(recovered.rates.tried)}")
    table.add_row("trained parameters", f"{recovered.trainable_parameters:,}")
    table.add_row("time", f"{recovered.seconds:.1f} s")
    table.add_row("peak memory", f"{recovered.peak_memory_bytes / 1e6:,.0f} MB")
    console.print(table)
    if recovered.best_step == 0:
        console.print("training never lowered the held-out loss, so the weights are unchanged; try a lower --lr or more --steps")
