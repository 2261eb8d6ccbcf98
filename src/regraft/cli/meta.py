"""``regraft meta``: learn a prior from past rank searches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from regraft.atomic import reserved
from regraft.cli.later import later
from regraft.cli.screen import Screen
from regraft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from regraft.allocation.meta import Training, read_store, train
else:
    read_store = later("regraft.allocation.meta", "read_store")
    train = later("regraft.allocation.meta", "train")

ACTIONS = ("train",)


def meta(
    action: Annotated[str, typer.Argument(metavar="train", help="action: train a prior", show_default=False)],
    store: Annotated[Path, typer.Argument(metavar="STORE", help="folder of past rank searches, one JSON file each", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder for the prior, which must not exist")] = Path(
        "prior"
    ),
) -> None:
    """Train a prior for the next search for ranks on past searches.

    The prior holds what the searches in the store have in common: what the features of a layer say about its gain, where gains saturate,
    and how much of a gain a short recovery shows. The command reports the error on searches that were left out, before any of their trials.
    """
    if action not in ACTIONS:
        raise InputError(f"unknown action '{action}'; known: {', '.join(ACTIONS)}{did_you_mean(action, ACTIONS)}")
    with reserved(output):
        training = train(read_store(store))
        training.prior.save(output)
    _show(Screen(), training)
    Screen().print(f"prior written to {output}", soft_wrap=True, markup=False, highlight=False)


def _show(console: Console, training: Training) -> None:
    """Prints the errors on left-out searches, and the learned parameters."""
    table = Table(title=f"{training.searches} searches, each predicted before its first trial")
    for name in ("start", "rank correlation", "R2", "RMSE in nats"):
        table.add_column(name, justify="left" if name == "start" else "right")
    for name, error in (("trained on the others", training.left_out), ("untrained", training.untrained)):
        table.add_row(name, f"{error.rank_correlation:+.3f}", f"{error.r2:+.3f}", f"{error.rmse_nats:.5f}")
    console.print(table)
    prior = training.prior
    deviations = prior.covariance.diagonal() ** 0.5
    learned = Table(title="what was learned")
    for name in ("parameter", "mean", "deviation"):
        learned.add_column(name, justify="left" if name == "parameter" else "right")
    for name, mean, deviation in zip(prior.names, prior.mean, deviations, strict=True):
        learned.add_row(name, f"{mean:+.3f}", f"{deviation:.3f}")
    console.print(learned)
