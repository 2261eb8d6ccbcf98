"""The report of a run as a page (HTML, self-contained), as Markdown, and as a table on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.table import Table

from regraft.errors import in_code, in_markdown, shown
from regraft.plans import Measurement
from regraft.report.curve import loss_curve
from regraft.report.ranks import slots_table, summary
from regraft.report.summary import RunReport, caption, factor_lines, plan_lines, speed_note, table, tasks_table, won_back

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1c2733;background:#fff}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #e3e7ec}
th:first-child,td:first-child{text-align:left}.note{color:#556;font-size:.88rem}.lead{font-size:1.1rem;font-weight:600}
pre{background:#f5f7f9;padding:.8rem;overflow-x:auto;white-space:pre-wrap;border-radius:4px}svg{max-width:42rem;width:100%}
.bar{background:#e3e7ec;height:.6rem;width:12rem;display:inline-block}.bar i{background:#0b6bcb;height:100%;display:block}
""".strip()


def screen_table(measurements: Sequence[Measurement]) -> Table:
    """Returns the table of the models, for a terminal."""
    heading, *rows = table(measurements)
    screen = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(heading):
        screen.add_column(name, justify="right" if index else "left")
    for row in rows:
        screen.add_row(*row)
    return screen


def to_markdown(report: RunReport) -> str:
    """Returns the report as Markdown."""
    described = [in_markdown(report.description), ""] if report.description else []
    lines = [f"# {in_markdown(report.title)}", "", *described, *_lead(report)]
    lines += [*_markdown_table(*table(report.measurements)), ""]
    lines += [line for note in _notes(report) for line in (in_markdown(note), "")]
    if report.tasks:
        lines += ["## Tasks", "", *_markdown_table(*tasks_table(report.tasks)), ""]
    if report.plan is not None:
        lines += ["## What was cut", "", *(f"- {in_markdown(line)}" for line in plan_lines(report)), ""]
        cells = [[width.group, str(width.before), str(width.after)] for width in report.widths]
        lines += [*_markdown_table(["group", "units before", "units after"], *cells), ""]
    if report.factors is not None:
        lines += ["## What was factored", "", *(f"- {line}" for line in factor_lines(report.factors)), ""]
    if report.ranks is not None:
        heading, rows = slots_table(report.ranks)
        lines += ["## Ranks", "", in_markdown(report.ranks.verdict), "", *summary(report.ranks), "", *_markdown_table(heading, *rows), ""]
    if report.curve:
        lines += ["## Loss while recovering", "", f"Step {report.best_step} was kept.", ""]
        cells = [[str(point.step), _number(point.train_nats), _number(point.held_out_nats)] for point in report.curve]
        lines += [*_markdown_table(["step", "train, nats", "held out, nats"], *cells), ""]
    if report.samples:
        lines += ["## Samples", "", f"Prompt: {in_code(repr(report.prompt))}, greedy.", ""]
        lines += [line for label, text in report.samples.items() for line in (f"**{in_markdown(label)}**", "", *_fenced(text), "")]
    lines += ["## How it came to be", "", *(f"- {in_markdown(name)}: {in_markdown(value)}" for name, value in report.facts.items()), ""]
    return "\n".join([*lines, *_fenced(report.recipe.rstrip(), "yaml"), ""])


def to_html(report: RunReport) -> str:
    """Returns the report as one HTML page without scripts or external files."""
    body = [f"<h1>{escape(report.title)}</h1>", f'<p class="note">{escape(report.description)}</p>']
    body += [f'<p class="lead">{escape(line)}</p>' for line in _lead(report) if line]
    body.append(_html_table(*table(report.measurements)))
    body += [f'<p class="note">{escape(note)}</p>' for note in _notes(report)]
    if report.curve:
        body += ["<h2>Loss while recovering</h2>", loss_curve(report.curve, best_step=report.best_step)]
        body.append(f'<p class="note">Step {report.best_step} was kept: its held-out loss, on text set aside from the training data.</p>')
    if report.plan is not None:
        body.append("<h2>What was cut</h2>")
        body += [f"<p>{escape(line)}</p>" for line in plan_lines(report)]
        body.append(_widths(report))
    if report.factors is not None:
        body += ["<h2>What was factored</h2>", *(f"<p>{escape(line)}</p>" for line in factor_lines(report.factors))]
    if report.ranks is not None:
        heading, rows = slots_table(report.ranks)
        body += ["<h2>Ranks</h2>", f"<p>{escape(report.ranks.verdict)}</p>"]
        body += [f'<p class="note">{escape(line.removeprefix("- "))}</p>' for line in summary(report.ranks)]
        body.append(_html_table(heading, *rows))
    if report.samples:
        body += ["<h2>Samples</h2>", f'<p class="note">Prompt: {escape(repr(report.prompt))}, greedy.</p>']
        body += [f"<h3>{escape(label)}</h3><pre>{escape(text)}</pre>" for label, text in report.samples.items()]
    body.append("<h2>How it came to be</h2>")
    body.append(_html_table(["", ""], *([name, str(value)] for name, value in report.facts.items())))
    body.append(f"<pre>{escape(report.recipe)}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)} - regraft</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _lead(report: RunReport) -> list[str]:
    won = won_back(report.measurements)
    return [f"{won.sentence()[0].upper()}{won.sentence()[1:]}.", ""] if won is not None else []


def _notes(report: RunReport) -> list[str]:
    return [note for note in (caption(report.measurements), speed_note(report.measurements)) if note]


def _markdown_table(headings: Sequence[str], *cells: Sequence[str]) -> list[str]:
    head = ["| " + " | ".join(map(in_markdown, headings)) + " |", "|" + "|".join(["---", *["---:"] * (len(headings) - 1)]) + "|"]
    return head + ["| " + " | ".join(map(in_markdown, row)) + " |" for row in cells]


def _html_table(headings: Sequence[str], *cells: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in cells]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"


def _widths(report: RunReport) -> str:
    """Draws a bar for the kept units of every group."""
    lines = [
        f"<tr><td>{escape(width.group)}</td><td>{width.after} of {width.before}</td>"
        f'<td><span class="bar"><i style="width:{100 * width.after / max(width.before, 1):.1f}%"></i></span></td></tr>'
        for width in report.widths
    ]
    return f"<table><thead><tr><th>group</th><th>units kept</th><th></th></tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _fenced(text: str, language: str = "text") -> list[str]:
    """Returns the text in a code fence that is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + language, "\n".join(shown(line, len(line) + 1) for line in text.split("\n")), fence]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
