"""``regraft complete``: complete a table of ratings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import JsonOption, QuietOption, SeedOption, with_settings
from regraft.cli.progress import progress
from regraft.cli.screen import Screen
from regraft.errors import InputError
from regraft.progress import Step
from regraft.settings import CompletionSettings

if TYPE_CHECKING:
    from regraft.completion.complete import CompletionReport, complete_ratings
else:
    complete_ratings = later("regraft.completion.complete", "complete_ratings")

LABELS = {
    "compressed": "compressed factorization",
    "mean": "mean",
    "biases": "biases only",
    "factorization": "plain factorization",
    "truncated_svd": "truncated SVD",
}


@with_settings
def complete(
    ratings: Annotated[
        Path,
        typer.Argument(
            metavar="RATINGS.csv", help="CSV file with user, item and rating on each line (MovieLens style)", show_default=False
        ),
    ],
    complete: CompletionSettings,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder for the predictions, which must not exist")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="file of users and items to predict; predictions go to pairs.csv")
    ] = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
    seed: SeedOption = 0,
) -> None:
    """Complete a table of ratings by a compressed deep factorization; report held-out errors beside four baselines."""
    if pairs is not None and output is None:
        raise InputError(f"--pairs {pairs} asks for predictions, but --output is missing; say where they go")
    wanted = Figures(json_file)
    with wanted.reserved("rmse", "mae", "baselines"):
        with progress("reading the ratings", quiet=quiet) as say:

            def share(label: str, done: float) -> None:
                say(Step(label, min(100, int(100 * done)), 100))

            report = complete_ratings(ratings, output, complete, pairs=pairs, seed=seed, progress=share)
        wanted.write(json.dumps(report.flat(), indent=2, allow_nan=False, ensure_ascii=False))
    if wanted.on_screen:
        return
    console = Screen()
    _show(console, report)
    if json_file is not None:
        console.print(f"figures written to {json_file}", soft_wrap=True, markup=False, highlight=False)
    if output is not None:
        console.print(f"predictions written to {output}", soft_wrap=True, markup=False, highlight=False)


def _show(console: Console, report: CompletionReport) -> None:
    """Prints the errors of ours and of the baselines, and what they were measured on."""
    table = Table(title=f"{report.ratings}: {report.held_out:,} held-out ratings")
    table.add_column("method")
    table.add_column("RMSE", justify="right")
    table.add_column("MAE", justify="right")
    for place, (name, errors) in enumerate(report.errors.items()):  # ours is the first
        table.add_row(LABELS[name], f"{errors.rmse:.4f}", f"{errors.mae:.4f}", style=None if place else "bold")
    console.print(table)
    for line in _remarks(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _remarks(report: CompletionReport) -> Iterator[str]:
    cut = f"threshold {report.threshold:g} of the top singular value" if report.threshold else "no shrinkage"
    yield (
        f"{report.known:,} ratings of {report.items:,} items by {report.users:,} users fitted at rank {report.rank}, {cut}, seed "
        f"{report.seed}, in {report.seconds:.1f} s"
    )
    if not report.converged:
        yield "the dynamics ended before their tolerance: the ratings are not quite of this rank; raise it, or leave --threshold at auto"
    if report.empty_users or report.empty_items:
        yield (
            f"{report.empty_users:,} users and {report.empty_items:,} items have held-out ratings only; they were predicted by the bias "
            "of the other side"
        )
    if report.unknown_pairs:
        yield f"{report.unknown_pairs:,} asked-for pairs name a user or an item without ratings; they were predicted by bias"
