"""The page in headless Chromium: pictures are drawn, tables sort, and names from model files stay text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from browser import needs_chromium, opened
from regraft.plans import LossReport, Measurement, PrunePlan, RankPlan, RankSearch, RankSlot, RankSpace, RankTrial, SizeReport
from regraft.plans.prune import Cut, Removed
from regraft.report.page import to_html
from regraft.report.pictures import layers_picture, pictures_of
from regraft.report.summary import CurvePoint, PastRun, RunReport, Width

LAYERS, TRIALS = 80, 500
ATTACK = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\x1b[31m"


def measured(label: str, loss: float, parameters: int) -> Measurement:
    report = LossReport(loss, 9.0, loss / 3, 64, 32, 100, 400, 3, True, ATTACK, "test")
    return Measurement(label, report, SizeReport(parameters, 2 * parameters, 2 * parameters, parameters, 64))


def large_report() -> RunReport:
    """Eighty layers cut unevenly, five hundred trials, and names that are HTML."""
    removed = {f"layers.{layer}.{kind}": Removed(64, 0.01 * layer) for layer in range(LAYERS) for kind in ("ffn", "heads")}
    cuts = tuple(Cut(name, tuple(range(32 + number % 16))) for number, name in enumerate(removed) if number % 3)
    kept = {cut.group: len(cut.kept) for cut in cuts}
    slots = tuple(RankSlot(f"layers.{layer}", (f"model.layers.{layer}.mlp.down_proj",), layer, 10, 64) for layer in range(LAYERS))
    trials = tuple(RankTrial((4,) * LAYERS, 3 - number / TRIALS, 0.1, 0.1) for number in range(TRIALS))
    ranks = RankPlan("f", "rankadaptor", {f"model.layers.{layer}.mlp.down_proj": 4 + layer % 9 for layer in range(LAYERS)})
    space = RankSpace("f", "layer", slots, (4, 8), 10**6, 8)
    search = RankSearch(ranks, space, trials, ("search",) * TRIALS, (4,) * LAYERS, (), None, None, (), None, f"kept {ATTACK}")
    return RunReport(
        title=f"run of {ATTACK}",
        description="a model of eighty layers",
        recipe=f"model: {ATTACK}\n",
        measurements=(measured("dense", 2.5, 1000), measured("recovered", 2.7, 800)),
        plan=PrunePlan("f", "taylor", "global", "per-layer", 0.2, 1, 1000, 800, cuts, removed=removed),
        widths=tuple(Width(name, 64, kept.get(name, 64)) for name in removed),
        ranks=search,
        curve=tuple(CurvePoint(step, 3 - step / 200, 3 - step / 210 if step % 10 == 0 else None) for step in range(1, 101)),
        best_step=100,
        prompt="x",
        samples={"dense": f"</pre>{ATTACK}"},
        facts={"model": ATTACK},
    )


PAST = tuple(PastRun(f"{ATTACK}{number}", "recovered", 1000 - 50 * number, 2.5 + 0.1 * number, number == 2) for number in range(6))


@pytest.mark.slow
@needs_chromium
def test_the_page_draws_sorts_and_runs_nothing_from_names(tmp_path: Path) -> None:
    page = to_html(large_report(), PAST)
    assert len(page.encode()) < 6e6
    click = "<script>setTimeout(() => {const b = document.querySelectorAll('#layers ~ * button, details table th button')[1];"
    click += "b.click(); b.click(); document.body.dataset.top = b.closest('table').tBodies[0].rows[0].cells[1].textContent}, 3000)</script>"
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", click + "</body>"), encoding="utf-8")
    shown, console = opened(file)
    assert console == []
    assert 'data-drawn="4"' in shown
    for name in ("layers", "curve", "search", "front"):
        place = shown.partition(f'id="{name}"')[2]
        assert 'class="main-svg"' in place[:3000], name
    assert len(re.findall(r'class="point"', shown)) > 2 * LAYERS  # the bars of both kinds of units
    assert "<title>run of &lt;script&gt;" in shown
    assert '<img src="x"' not in shown
    # Sorted downwards by the second column, units kept of the first kind.
    assert shown.partition('data-top="')[2].startswith("64 of 64")


def test_names_are_escaped_in_figures_and_in_the_page() -> None:
    report = large_report()
    plain = to_html(report, PAST, interactive=False)
    assert "<script>document" not in plain
    assert "<img" not in plain
    for picture in pictures_of(report, PAST):
        assert "<script" not in str(picture.figure)
        assert "<img" not in str(picture.figure)
    packed = to_html(report, PAST)
    assert packed.partition('id="figures">')[2].partition("</script>")[0].count("<") == 0


def test_the_layers_have_every_number_in_the_table_and_in_the_figure() -> None:
    report = large_report()
    picture = layers_picture(report)
    assert picture is not None
    heading, *rows = picture.table
    assert heading == ["layer", "ffn kept", "heads kept", "ffn importance removed", "heads importance removed", "rank down_proj"]
    assert len(rows) == LAYERS
    widths = {width.group: width.after for width in report.widths}
    assert rows[7][:3] == ["7", f"{widths['layers.7.ffn']} of 64", f"{widths['layers.7.heads']} of 64"]
    assert rows[7][5] == "11"
    kept = next(trace for trace in picture.figure["data"] if trace.get("name") == "kept")
    assert kept["y"] == [widths[f"layers.{layer}.ffn"] for layer in range(LAYERS)]
    bare = replace(report, widths=(), plan=None, ranks=None)
    assert layers_picture(bare) is None
