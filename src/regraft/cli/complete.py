"""``regraft complete``: complete a table of ratings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from regraft.atomic import json_with, reserved_file, write_text
from regraft.cli.options import SeedOption
from regraft.cli.screen import Screen
from regraft.completion.complete import BASELINES, OURS, CompletionReport, CompletionSettings, complete_ratings
from regraft.completion.ratings import Duplicates
from regraft.completion.tuning import Progress as Told
from regraft.errors import InputError

STDOUT = Path("-")

N = TypeVar("N", int, float)

LABELS = {
    OURS: "compressed factorization",
    "mean": "mean",
    "biases": "biases only",
    "factorization": "plain factorization",
    "truncated_svd": "truncated SVD",
}


def complete(
    ratings: Annotated[
        Path,
        typer.Argument(
            metavar="RATINGS.csv", help="CSV file with user, item and rating on each line (MovieLens style)", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder for the predictions, which must not exist")
    ] = None,
    rank: Annotated[str, typer.Option("--rank", metavar="N|auto", help="rank of the completion; auto: by held-out error")] = "10",
    depth: Annotated[int, typer.Option("--depth", metavar="N", help="number of inner factors of the compressed factorization")] = 3,
    held_out: Annotated[float, typer.Option("--held-out", metavar="X", help="share of the ratings held out for measuring the error")] = 0.1,
    threshold: Annotated[
        str,
        typer.Option("--threshold", metavar="X|auto", help="threshold for the singular values, as a share of the top one; 0: exact data"),
    ] = "auto",
    gamma: Annotated[
        float, typer.Option("--gamma", metavar="X", help="learning rate of the outer factors relative to the inner ones, at threshold 0")
    ] = 0.01,
    biases: Annotated[
        bool, typer.Option("--biases/--no-biases", help="remove the mean and the biases of users and items before the fit")
    ] = True,
    duplicates: Annotated[
        str, typer.Option("--duplicates", metavar="[refuse|mean|last]", help="treatment of items that a user rated more than once")
    ] = "refuse",
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="file of users and items to predict; predictions go to pairs.csv")
    ] = None,
    recommend: Annotated[
        int, typer.Option("--recommend", metavar="N", help="number of unrated items to recommend to every user; 0: none")
    ] = 10,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="file for the figures as JSON; - for the screen")] = None,
    seed: SeedOption = 0,
) -> None:
    """Complete a table of ratings by a compressed deep factorization; report held-out errors beside four baselines."""
    if pairs is not None and output is None:
        raise InputError(f"--pairs {pairs} asks for predictions, but --output is missing; say where they go")
    settings = CompletionSettings(
        rank="auto" if rank == "auto" else _number(rank, "--rank", int),
        depth=depth,
        held_out=held_out,
        biases=biases,
        threshold="auto" if threshold == "auto" else _number(threshold, "--threshold", float),
        gamma=gamma,
        seed=seed,
        device=device,
        duplicates=cast(Duplicates, duplicates),
        recommend=recommend,
    )
    file = json_file if json_file != STDOUT else None
    with reserved_file(file, json_with("rmse", "mae", "baselines")):
        with _bar() as told:
            report = complete_ratings(ratings, output, settings, pairs=pairs, progress=told)
        text = json.dumps(report.flat(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        if file is not None:
            write_text(file, text)
    if json_file == STDOUT:
        print(text, end="")
        return
    console = Screen()
    _show(console, report)
    if json_file is not None:
        console.print(f"figures written to {json_file}", soft_wrap=True, markup=False, highlight=False)
    if output is not None:
        console.print(f"predictions written to {output}", soft_wrap=True, markup=False, highlight=False)


def _number(text: str, option: str, kind: Callable[[str], N]) -> N:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{option} '{text}' is neither {what} nor auto; give one of the two") from None


@contextmanager
def _bar() -> Iterator[Told]:
    """Shows the current step in a progress bar, on the standard error and only if that is a terminal; removes it at the end."""
    console = Screen(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda label, share: bar.update(task, description=label, completed=min(share, 1.0))


def _show(console: Console, report: CompletionReport) -> None:
    """Prints the errors of our completion and of the baselines, and the conditions of the measurement."""
    table = Table(title=f"{report.ratings}: {report.held_out:,} held-out ratings")
    table.add_column("method")
    table.add_column("RMSE", justify="right")
    table.add_column("MAE", justify="right")
    for name in (OURS, *BASELINES):
        errors = report.errors[name]
        table.add_row(LABELS[name], f"{errors.rmse:.4f}", f"{errors.mae:.4f}", style="bold" if name == OURS else None)
    console.print(table)
    for line in _remarks(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _remarks(report: CompletionReport) -> Iterator[str]:
    cut = f"threshold {report.threshold:g} of the top singular value" if report.threshold else "no shrinkage"
    yield (
        f"{report.known:,} ratings of {report.items:,} items by {report.users:,} users fitted at rank {report.rank}, {cut}, seed "
        f"{report.settings.seed}, in {report.seconds:.1f} s"
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
