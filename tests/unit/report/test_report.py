from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from regraft.plans import LossReport, Measurement, PrunePlan, SizeReport, SpeedReport
from regraft.report.curve import loss_curve
from regraft.report.page import screen_table, to_html, to_markdown
from regraft.report.summary import CurvePoint, RunReport, Width, WonBack, caption, scaled, table, won_back

SPEED = SpeedReport(0.1234, 0.0123, 123_000_000, 256, 32, 5, 2, "cpu")


def measurement(label: str, loss: float, parameters: int, speed: SpeedReport | None = None) -> Measurement:
    report = LossReport(loss, 2.718281828459045**loss, loss / 3, 256, 128, 12_345, 54_321, 30, True, "the text", "test")
    return Measurement(label, report, SizeReport(parameters, parameters * 2, parameters * 4, parameters + 500, 256), speed)


THREE = (measurement("dense", 3.0, 5_000_000), measurement("pruned", 4.0, 3_750_000), measurement("recovered", 3.4, 3_750_000))


@pytest.fixture
def report() -> RunReport:
    return RunReport(
        title="a <run>",
        description="one & only",
        recipe="model: x  # <tag>\n",
        measurements=THREE,
        plan=PrunePlan("f", "taylor", "global", "per-layer", 0.25, 16, 5_000_000, 3_750_000, ()),
        widths=(Width("layers.0.ffn", 704, 352), Width("layers.0.heads", 4, 4)),
        curve=tuple(
            CurvePoint(10 * step, None if step == 0 else 4.0 - 0.05 * step, 4.1 - 0.05 * step if step % 5 == 0 else None)
            for step in range(11)
        ),
        best_step=100,
        prompt="def",
        samples={"dense": "x < y\n```\nfence", "pruned": "", "recovered": "z"},
        facts={"command": "regraft run a", "seed": 0},
    )


def test_what_was_won_back() -> None:
    won = won_back(THREE)
    assert won is not None
    assert won.cost_nats == pytest.approx(1.0)
    assert won.gain_nats == pytest.approx(0.6)
    assert won.share == pytest.approx(0.6)
    assert won.sentence() == "recovery won back 60 % of the 1.00 nats that pruning cost"
    assert won_back(THREE[:2]) is None


@pytest.mark.parametrize(
    ("cost", "gain", "sentence"),
    [
        (0.81, 0.51, "recovery won back 63 % of the 0.81 nats that pruning cost"),
        (0.5, 0.6, "recovery won back 120 % of the 0.50 nats that pruning cost"),
        (0.5, -0.1, "recovery lost 0.10 nats more, on top of the 0.50 nats that pruning cost"),
        (0.0123, 0.006, "recovery won back 49 % of the 0.0123 nats that pruning cost"),
        (-0.2, 0.1, "pruning cost nothing (0.20 nats better than dense); recovery lowered the loss by 0.10 nats"),
        (0.0, -0.1, "pruning cost nothing (0.0000 nats better than dense); recovery raised the loss by 0.10 nats"),
    ],
)
def test_it_is_said_in_words(cost: float, gain: float, sentence: str) -> None:
    assert WonBack(cost, gain).sentence() == sentence


def test_the_table_holds_every_figure() -> None:
    rows = {row[0].strip(): row[1:] for row in table(THREE)}
    assert rows[""] == ["dense", "pruned", "recovered"]
    assert rows["loss, nats a token"] == ["3.000", "4.000", "3.400"]
    assert rows["parameters"] == ["5,000,000", "3,750,000", "3,750,000"]
    assert rows["of the first"] == ["100.0%", "75.0%", "75.0%"]
    assert rows["on disk"] == ["10 MB", "7.5 MB", "7.5 MB"]
    assert "prefill" not in rows


def test_speeds_have_rows_only_when_measured() -> None:
    rows = {row[0]: row[1:] for row in table([replace(THREE[0], speed=SPEED), THREE[1]])}
    assert rows["prefill"] == ["123.4 ms", ""]
    assert rows["decode, a token"] == ["12.30 ms", ""]
    assert rows["peak memory"] == ["123 MB", ""]


def test_the_caption_says_what_the_losses_are_of() -> None:
    assert caption(THREE) == (
        "12,345 tokens of the text (test, 30 documents, 54,321 bytes); window 256, stride 128, each document starts with BOS; "
        "MACs at a context of 256"
    )


def test_the_screen_fits_eighty_columns() -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(screen_table([replace(entry, speed=SPEED) for entry in THREE]))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in captured.get()
    assert any(re.fullmatch(r" ?loss, nats a token +3\.000 +4\.000 +3\.400 *", line) for line in lines)


class Tags(HTMLParser):
    """Collects what a page could load or run, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("link", "iframe", "img", "object", "embed"):
            self.outside.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href", "onload", "onclick") and value != "#content"]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta",):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_escapes_what_it_shows(report: RunReport) -> None:
    page = to_html(report, interactive=False)
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    assert tags.outside == []
    text = "".join(tags.text)
    for words in (
        "a <run>",
        "one & only",
        "recovery won back 60 % of the 1.00 nats",
        "352 of 704",
        "x < y\n```\nfence",
        "regraft run a",
    ):
        assert words in text
    assert "model: x  # <tag>" in text
    assert "@import" not in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_page_of_the_same_run_is_the_same_text(report: RunReport) -> None:
    assert to_html(report) == to_html(replace(report))
    assert to_markdown(report) == to_markdown(replace(report))


def test_a_run_without_recovery_or_pruning_has_a_page() -> None:
    plain = RunReport(title="t", description="", recipe="model: x\n", measurements=THREE[:1])
    assert "<svg" not in to_html(plain)
    assert "What was cut" not in to_html(plain)
    assert "# t" in to_markdown(plain)


def test_markdown_fences_hold_whatever_a_model_writes(report: RunReport) -> None:
    text = to_markdown(report)
    assert "````text\nx < y\n```\nfence\n````" in text
    assert "| layers.0.ffn | 704 | 352 |" in text


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in lines]


def test_the_curve_falls_where_the_loss_falls(report: RunReport) -> None:
    svg = loss_curve(report.curve, best_step=100)
    train, held_out = points_of(svg)
    assert len(train) == 10
    assert len(held_out) == 3
    assert [x for x, _ in train] == sorted(x for x, _ in train)
    assert [y for _, y in train] == sorted(y for _, y in train)  # pixels grow downwards
    slope = (held_out[2][1] - held_out[0][1]) / (4.1 - 3.6)
    assert (train[9][1] - train[0][1]) / (3.95 - 3.5) == pytest.approx(slope, rel=0.02)
    root = ElementTree.fromstring(svg)
    circle = root.find("{http://www.w3.org/2000/svg}circle")
    assert circle is not None
    assert (float(circle.attrib["cx"]), float(circle.attrib["cy"])) == held_out[2]
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for line in (train, held_out) for x, y in line)


@pytest.mark.parametrize(
    "curve",
    [
        (CurvePoint(0, None, 3.0),),
        (CurvePoint(0, None, 3.0), CurvePoint(1, 3.0, 3.0)),
        (CurvePoint(0, None, 1e-6), CurvePoint(100000, 2e6, None)),
        (CurvePoint(0, None, float("nan")), CurvePoint(5, 2.0, float("inf")), CurvePoint(6, 2.5, 2.0)),
    ],
)
def test_odd_curves_are_still_drawn(curve: tuple[CurvePoint, ...]) -> None:
    svg = loss_curve(curve)
    ElementTree.fromstring(svg)
    assert "nan" not in svg
    assert "inf" not in svg


def test_nothing_to_draw() -> None:
    assert loss_curve(()) == ""
    assert loss_curve((CurvePoint(0, None, None),)) == ""


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (8_388_608, "8.39 MB"), (7e12, "7 TB")])
def test_scaled(value: float, text: str) -> None:
    assert scaled(value, "B") == text
