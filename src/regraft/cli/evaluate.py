"""``regraft evaluate``: measure a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.figures import Figures
from regraft.cli.later import later
from regraft.cli.options import ModelArgument, QuietOption, SeedOption, with_settings
from regraft.cli.progress import progress
from regraft.cli.screen import Screen
from regraft.cli.tasks import show_tasks, tasks_json
from regraft.errors import InputError
from regraft.plans import Measurement, TaskReport
from regraft.progress import Step
from regraft.settings import EvaluateSettings, LabelSettings, LoadSettings, TaskSettings

if TYPE_CHECKING:
    from regraft.evaluation.harness import flat
    from regraft.pipelines.evaluate import evaluate_model
    from regraft.pipelines.evaluate_labels import LabelReport, evaluate_labels
    from regraft.pipelines.evaluate_tasks import evaluate_tasks
else:
    flat = later("regraft.evaluation.harness", "flat")
    evaluate_model = later("regraft.pipelines.evaluate", "evaluate_model")
    evaluate_labels = later("regraft.pipelines.evaluate_labels", "evaluate_labels")
    evaluate_tasks = later("regraft.pipelines.evaluate_tasks", "evaluate_tasks")


@with_settings
def evaluate(
    model: ModelArgument,
    evaluate: EvaluateSettings,
    tasks: TaskSettings,
    labels: LabelSettings,
    load: LoadSettings,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="a second model, compared with the first item by item; for tasks")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="file for the figures as flat JSON; - for the screen")
    ] = None,
    quiet: QuietOption = False,
    seed: SeedOption = 0,
) -> None:
    """Measure a model: loss, perplexity, bits per byte, size and, if asked, speed; on tasks or labels, accuracy."""
    asked = bool(tasks.tasks or tasks.texts)
    if labels.data is not None and asked:
        raise InputError(f"--data {labels.data} is for models for labels, --tasks and --texts for language; give one of the two")
    if against is not None and not asked:
        raise InputError(f"--against {against} compares models on tasks; name some: --tasks continuation")
    if labels.data is not None and evaluate.text is not None:
        raise InputError(f"--data {labels.data} is for models for labels, --text {evaluate.text} for language; give one of the two")
    reports: list[TaskReport] = []
    lines: list[tuple[str, str]] = []
    wanted = Figures(json_file)
    with wanted.reserved("model", "parameters"):
        with progress("measuring", quiet=quiet) as say:

            def count(done: int, total: int) -> None:
                say(Step("measuring", done, total))

            if labels.data is not None:
                report = evaluate_labels(model, labels, load=load, progress=count)
                figures, lines = report.flat(), label_rows(report)
            elif asked:
                names = [model] if against is None else [model, against]
                reports = [evaluate_tasks(name, tasks, evaluate=evaluate, load=load, seed=seed, progress=count) for name in names]
                figures = tasks_json(reports, seed)
            else:
                measurement = evaluate_model(model, evaluate, load=load, seed=seed, progress=count)
                figures, lines = flat(measurement), rows(measurement)
        wanted.write(json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False))
    if wanted.on_screen:
        return
    if reports:
        show_tasks(Screen(), reports, seed)
    else:
        show_figures(Screen(), model, lines)
    if json_file is not None:
        Screen().print(f"written to {json_file}", soft_wrap=True, markup=False, highlight=False)


def show_figures(console: Console, label: str, lines: Iterable[tuple[str, str]]) -> None:
    """Prints a table of figures."""
    table = Table(title=label, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right", overflow="fold")
    for what, value in lines:
        table.add_row(what, value)
    console.print(table)


def label_rows(report: LabelReport) -> list[tuple[str, str]]:
    """Returns the figures of a classification or regression model as pairs of words and formatted values."""
    return [
        *((name.replace("_", " "), f"{value:.4f}") for name, value in report.figures.items()),
        ("data", f"{report.data} ({report.rows:,} rows of up to {report.window_tokens} tokens)"),
        ("task", f"{report.task} ({', '.join(report.classes)})" if report.classes else report.task),
        ("parameters", f"{report.parameters:,}"),
    ]


def rows(measurement: Measurement) -> list[tuple[str, str]]:
    """Returns a measurement as pairs of words and formatted values with units."""
    loss, size, speed = measurement.loss, measurement.size, measurement.speed
    found = [
        ("loss", f"{loss.loss_nats:.4f} nats/token"),
        ("perplexity", f"{loss.perplexity:,.3f}" if loss.perplexity < 1e6 else f"{loss.perplexity:.3e}"),
        ("bits per byte", f"{loss.bits_per_byte:.4f}"),
        ("text", loss.text),
        ("split", loss.split),
        ("documents", f"{loss.documents:,} ({'each starts with BOS' if loss.bos else 'no BOS'})"),
        ("tokens predicted", f"{loss.tokens:,} ({loss.bytes:,} bytes of text)"),
        ("window / stride", f"{loss.window_tokens} / {loss.stride_tokens} tokens"),
        ("parameters", f"{size.parameters:,}"),
        ("on disk / in memory", f"{size.bytes_on_disk / 1e6:,.2f} MB / {size.bytes_in_memory / 1e6:,.2f} MB"),
        ("MACs per token", f"{size.macs_per_token:,} (context of {size.context_tokens} tokens)"),
    ]
    if speed is not None:
        found += [
            ("prefill", f"{1e3 * speed.prefill_seconds:,.1f} ms for {speed.prompt_tokens} tokens"),
            ("decode", f"{1e3 * speed.decode_seconds_per_token:,.2f} ms/token over {speed.decoded_tokens} tokens"),
            ("peak memory", f"{speed.peak_memory_bytes / 1e6:,.1f} MB ({speed.device}, {speed.threads} threads)"),
            ("speed is", f"the median of {speed.repeats} repeats"),
        ]
        if speed.prefill_flop:
            found += [
                ("prefill, fastest to slowest", f"{1e3 * speed.prefill_low_seconds:,.1f} to {1e3 * speed.prefill_high_seconds:,.1f} ms"),
                (
                    "decode, fastest to slowest",
                    f"{1e3 * speed.decode_low_seconds_per_token:,.2f} to {1e3 * speed.decode_high_seconds_per_token:,.2f} ms/token",
                ),
                ("they enclose the median", f"with a confidence of {speed.confidence:.1%}"),
                ("floor of the prefill", f"{1e3 * speed.prefill_floor_seconds:,.1f} ms ({speed.prefill_flop / 1e9:,.3g} GFLOP)"),
                ("floor of decoding", f"{1e3 * speed.decode_floor_seconds:,.2f} ms/token ({speed.decode_bytes / 1e6:,.1f} MB of weights)"),
            ]
    return found
