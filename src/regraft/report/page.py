"""The report of a run as a page (HTML, self-contained), as Markdown, and as a table on the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.table import Table

from regraft.errors import in_code, in_markdown, shown
from regraft.plans import Measurement
from regraft.report.assets import packed_plotly, script, style
from regraft.report.curve import loss_curve
from regraft.report.pictures import Picture, pictures_of
from regraft.report.ranks import slots_table, summary
from regraft.report.summary import (
    PastRun,
    RunReport,
    caption,
    factor_lines,
    plan_lines,
    scaled,
    speed_note,
    table,
    tasks_table,
)
from regraft.report.verdict import did_not_help, verdict, worst_text

# Nothing is fetched, whatever a page holds; the script and the style stand in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


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
    lines += _tried(report)
    if report.samples:
        lines += ["## Samples", "", f"Prompt: {in_code(repr(report.prompt))}, greedy.", ""]
        lines += [line for label, text in report.samples.items() for line in (f"**{in_markdown(label)}**", "", *_fenced(text), "")]
    lines += ["## How it came to be", "", *(f"- {in_markdown(name)}: {in_markdown(value)}" for name, value in report.facts.items()), ""]
    return "\n".join([*lines, *_fenced(report.recipe.rstrip(), "yaml"), ""])


def to_html(report: RunReport, past: Sequence[PastRun] = (), *, interactive: bool = True) -> str:
    """Returns the report as one HTML page that loads nothing from elsewhere.

    Args:
        report: What the page shows.
        past: Models of all runs in the same folder, measured on the same text.
        interactive: Whether Plotly is put into the page, about 2 MB, where it is installed; otherwise the loss curve alone is drawn.
    """
    library = packed_plotly() if interactive else None
    pictures = pictures_of(report, past)
    figures = {picture.name: picture.figure for picture in pictures}
    body = [
        '<a class="skip" href="#content">Skip to the content</a>',
        "<header>",
        '<p class="brand">regraft report</p>',
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="note">{escape(report.description)}</p>' if report.description else "",
        f'<p class="verdict">{escape(verdict(report))}</p>',
        "</header>",
        '<main id="content">',
        *_tiles(report),
        *_sections(report, pictures, drawn=library is not None),
        "</main>",
        f"<footer>{escape(_foot(report))}</footer>",
    ]
    if library is not None and pictures:
        # "<" cannot end the element when it is written as an escape.
        body.append(
            f'<script type="application/json" id="figures">{json.dumps(figures, allow_nan=False).replace("<", chr(92) + "u003c")}</script>'
        )
        body.append(f'<script type="text/plain" id="plotly">{library}</script>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(report.title)} - regraft</title><style>{style()}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{script()}</script>\n</body></html>\n"
    )


def _sections(report: RunReport, pictures: Sequence[Picture], *, drawn: bool) -> Iterator[str]:
    """Yields the sections of the page in their order."""
    named = {picture.name: picture for picture in pictures}
    if report.measurements:
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in _notes(report))
        yield _section(
            "Before and after", _html_table(*table(report.measurements), label="models before and after", sortable=False) + notes
        )
    if report.tasks:
        worst = f'<p class="note">{escape(worst_text(report))}</p>' if worst_text(report) else ""
        note = '<p class="note">Behind ± is the standard error over the items.</p>'
        yield _section("Tasks and texts", _html_table(*tasks_table(report.tasks), label="tasks and texts") + note + worst)
    for name in ("layers", "curve", "search", "front"):
        if name in named:
            extra = loss_curve(report.curve, report.best_step, report.unit) if name == "curve" and not drawn else ""
            yield _pictured(named[name], _about(name, report), extra, drawn=drawn)
    if report.plan is not None and "layers" not in named:
        yield _section("What was cut", "".join(f"<p>{escape(line)}</p>" for line in plan_lines(report)))
    tried = did_not_help(report)
    if tried:
        yield _section("What did not help", f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in tried)}</ul>")
    if report.samples:
        shown = "".join(f"<div><h3>{escape(label)}</h3><pre>{escape(text)}</pre></div>" for label, text in report.samples.items())
        prompt = f'<p class="note">Prompt: {escape(repr(report.prompt))}, greedy decoding.</p>'
        yield _section("Samples", f'{prompt}<div class="samples">{shown}</div>')
    facts = _html_table(
        ["what", "value"], *([name, str(value)] for name, value in report.facts.items()), label="versions and seeds", sortable=False
    )
    recipe = f"<h3>Recipe</h3><pre>{escape(report.recipe)}</pre>" if report.recipe else ""
    yield _section("How it came to be", facts + recipe)


def _about(name: str, report: RunReport) -> list[str]:
    """Returns the lines in words that stand above a picture."""
    lines: list[str] = []
    if name == "layers":
        lines += plan_lines(report)
        lines += factor_lines(report.factors) if report.factors is not None else []
    if name == "search" and report.ranks is not None:
        lines += [line.removeprefix("- ") for line in summary(report.ranks)]
    return lines


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _pictured(picture: Picture, lines: Sequence[str], extra: str, *, drawn: bool) -> str:
    """Returns a section with a picture, its words, and its numbers behind a fold, which is open where nothing is drawn."""
    place = (
        f'<div class="picture" id="{picture.name}" role="img" aria-label="{escape(picture.words)}" style="height:{picture.height}px"></div>'
    )
    missing = "" if drawn else '<p class="note">The picture needs Plotly: pip install plotly, then regraft report.</p>'
    table = _html_table(*picture.table, label=f"numbers: {picture.title}")
    numbers = f"<details{'' if drawn else ' open'}><summary>The numbers</summary>{table}</details>"
    about = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    figure = f"<figure>{place if drawn else extra}<figcaption>{escape(picture.words)}</figcaption></figure>"
    return f'<section class="long"><h2>{escape(picture.title)}</h2>{about}{figure}{missing}{numbers}</section>'


def _tiles(report: RunReport) -> list[str]:
    """Returns the four figures at the top, of the last model beside the first."""
    if len(report.measurements) < 2:
        return []
    first, last = report.measurements[0], report.measurements[-1]
    tiles = [
        ("parameters", scaled(last.size.parameters, ""), _change(first.size.parameters, last.size.parameters)),
        ("loss, nats a token", f"{last.loss.loss_nats:.3f}", f"{last.loss.loss_nats - first.loss.loss_nats:+.3f}"),
        ("on disk", scaled(last.size.bytes_on_disk, "B"), _change(first.size.bytes_on_disk, last.size.bytes_on_disk)),
    ]
    if first.speed is not None and last.speed is not None:
        faster = first.speed.decode_seconds_per_token / last.speed.decode_seconds_per_token
        tiles.append(("decoding, a token", f"{1e3 * last.speed.decode_seconds_per_token:.2f} ms", f"{faster:.2f} times as fast"))
    else:
        tiles.append(("MACs a token", scaled(last.size.macs_per_token, ""), _change(first.size.macs_per_token, last.size.macs_per_token)))
    inside = "".join(
        f'<div><dt>{escape(what)}</dt><dd>{escape(value)} <span class="how">{escape(change)}</span></dd></div>'
        for what, value, change in tiles
    )
    return [f'<dl class="tiles">{inside}</dl>']


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _foot(report: RunReport) -> str:
    return f"Made by regraft. {caption(report.measurements)}" if report.measurements else "Made by regraft."


def _lead(report: RunReport) -> list[str]:
    return [f"**{in_markdown(verdict(report))}**", ""]


def _tried(report: RunReport) -> list[str]:
    tried = did_not_help(report)
    return ["## What did not help", "", *(f"- {in_markdown(line)}" for line in tried), ""] if tried else []


def _notes(report: RunReport) -> list[str]:
    return [note for note in (caption(report.measurements), speed_note(report.measurements)) if note]


def _markdown_table(headings: Sequence[str], *cells: Sequence[str]) -> list[str]:
    head = ["| " + " | ".join(map(in_markdown, headings)) + " |", "|" + "|".join(["---", *["---:"] * (len(headings) - 1)]) + "|"]
    return head + ["| " + " | ".join(map(in_markdown, row)) + " |" for row in cells]


def _html_table(headings: Sequence[str], *cells: Sequence[str], label: str, sortable: bool = True) -> str:
    """Returns a table whose columns are sorted by a click on their names; the label is for screen readers."""
    names = [f'<button type="button">{escape(name)}</button>' if sortable and name else escape(name) for name in headings]
    head = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in names)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in cells]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{inside}</div>'


def _fenced(text: str, language: str = "text") -> list[str]:
    """Returns the text in a code fence that is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + language, "\n".join(shown(line, len(line) + 1) for line in text.split("\n")), fence]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
