"""How the scores of tasks are shown and written; part of ``regraft evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from regraft.cli.later import later
from regraft.plans import TaskReport, TaskScore, to_dict

if TYPE_CHECKING:
    from regraft.evaluation.scores import compare
else:
    compare = later("regraft.evaluation.scores", "compare")


def tasks_json(reports: Sequence[TaskReport], seed: int) -> dict[str, Any]:
    """Returns the scores of one model as plain JSON types, and of two also their comparison."""
    found = to_dict(reports[0]) | {"model": reports[0].label}
    if len(reports) == 2:
        found["against"] = to_dict(reports[1])
        found["paired"] = [to_dict(one) for one in compare(reports[0], reports[1], seed=seed)]
    return found


def show_tasks(console: Console, reports: Sequence[TaskReport], seed: int) -> None:
    """Prints scores with their standard errors, examples and versions; then the losses on texts; then the comparison of two models."""
    for report in reports:
        console.print(f"{report.label}: {report.parameters:,} parameters", markup=False)
        if report.scores:
            console.print(_scores(report.scores))
        if report.losses:
            console.print(_losses(report))
        if report.worst is not None:
            worst = report.worst
            console.print(
                f"worst text: {worst.text} ({worst.bits_per_byte:.4f} bits per byte at window {worst.window_tokens})", markup=False
            )
        console.print(", ".join(f"{name} {number}" for name, number in report.versions.items()), style="dim", markup=False)
    if len(reports) == 2:
        console.print(_paired(reports, seed))
        console.print(
            "difference: the first model minus the second, with a 95 % interval (paired bootstrap); p: exact McNemar", style="dim"
        )


def _scores(scores: Sequence[TaskScore]) -> Table:
    table = Table()
    for index, name in enumerate(("task", "metric", "value", "stderr", "items", "shots", "version", "better")):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for one in scores:
        stderr = "not given" if one.stderr is None else f"{one.stderr:.4f}"
        better = "higher" if one.higher_is_better else "lower"
        table.add_row(one.task, one.metric, f"{one.value:.4f}", stderr, f"{one.items:,}", str(one.shots), one.version, better)
    return table


def _losses(report: TaskReport) -> Table:
    table = Table()
    for index, name in enumerate(("text", "window / stride", "tokens", "perplexity", "bits per byte", "loss, nats")):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for loss in report.losses:
        perplexity = f"{loss.perplexity:,.3f}" if loss.perplexity < 1e6 else f"{loss.perplexity:.3e}"
        windows = f"{loss.window_tokens} / {loss.stride_tokens}"
        table.add_row(loss.text, windows, f"{loss.tokens:,}", perplexity, f"{loss.bits_per_byte:.4f}", f"{loss.loss_nats:.4f}")
    return table


def _paired(reports: Sequence[TaskReport], seed: int) -> Table:
    table = Table(title=f"{reports[0].label} against {reports[1].label}")
    for index, name in enumerate(("task", "metric", "difference", "95 % interval", "only first", "only second", "p")):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    for one in compare(reports[0], reports[1], seed=seed):
        interval = f"{one.low:+.4f} to {one.high:+.4f}"
        table.add_row(
            one.task, one.metric, f"{one.difference:+.4f}", interval, str(one.only_first), str(one.only_second), f"{one.p_value:.3g}"
        )
    return table
