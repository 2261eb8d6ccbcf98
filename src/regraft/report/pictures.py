"""The pictures of a report: figures for Plotly, each with words for those who cannot see it and a table of its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from regraft.plans import LOSS_UNITS, RankSearch
from regraft.report.summary import CurvePoint, PastRun, RunReport, front_of

# Distinct in light and dark, for readers who confuse red and green too (after Okabe and Ito).
KEPT, GONE, SECOND, THIRD = "#2b7bba", "#9fb0bf", "#d9770b", "#1d9a78"
SCALE = [[0.0, "#d7e6f3"], [0.5, "#5c9bd1"], [1.0, "#0a3f73"]]

_OF_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: Its id on the page.
        title: Heading.
        words: What it shows, in a sentence.
        figure: ``data`` and ``layout`` for Plotly; all names in it are escaped.
        table: Its numbers: a heading, then rows.
        height: Height in pixels.
    """

    name: str
    title: str
    words: str
    figure: Mapping[str, Any]
    table: Sequence[Sequence[str]] = field(default_factory=tuple)
    height: int = 340


def pictures_of(report: RunReport, past: Sequence[PastRun]) -> list[Picture]:
    """Returns the pictures for which a report has numbers."""
    curve = curve_picture(report.curve, report.best_step, report.unit)
    made = (layers_picture(report), curve, search_picture(report.ranks), front_picture(past))
    return [picture for picture in made if picture is not None]


def layers_picture(report: RunReport) -> Picture | None:
    """Draws the layers from the first to the last: the width of each kind of unit before and after, what that cost, and the ranks."""
    widths = _by_kind({width.group: (width.before, width.after) for width in report.widths})
    losses = _by_kind({name: entry.importance for name, entry in report.plan.removed.items()} if report.plan is not None else {})
    ranks = _by_kind(_ranks(report))
    rows = list(widths) + (["damage"] if _matters(losses) else []) + (["ranks"] if ranks else [])
    if not rows:
        return None
    layers = 1 + max(layer for kind in (*widths.values(), *ranks.values()) for layer in kind)
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = _layout("layer, from the input to the output")
    for number, row in enumerate(rows):
        axis = "" if number == 0 else str(number + 1)
        bottom = 1 - (number + 1) / len(rows)
        layout[f"yaxis{axis}"] = {"domain": [bottom + (0.05 if len(rows) > 1 else 0), bottom + 1 / len(rows) - 0.03], "title": _axis(row)}
        layout[f"xaxis{axis}"] = {"anchor": f"y{axis}", "range": [-0.6, layers - 0.4], "showticklabels": number == len(rows) - 1}
        layout[f"xaxis{axis}"] |= {"dtick": 1 if layers <= 24 else None, "matches": "x" if number else None}
        where = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
        if row == "damage":
            data += [_line(kind, losses[kind], where, colour) for kind, colour in zip(losses, (SECOND, THIRD, KEPT, GONE), strict=False)]
        elif row == "ranks":
            data.append(_heat(ranks, layers, where))
            layout[f"yaxis{axis}"] |= {"type": "category", "autorange": "reversed"}
        else:
            data += _bars(row, widths[row], where, first=number == 0)
    layout[f"xaxis{'' if len(rows) == 1 else len(rows)}"]["title"] = {"text": "layer, from the input to the output"}
    cut = sum(width.before != width.after for width in report.widths)
    words = f"{layers} layers from left to right. " + (
        f"{cut} of {len(report.widths)} groups of units lost some. " if report.widths else ""
    )
    words += "Bars: units kept, before a paler bar of the units before." if widths else "Colours: ranks."
    return Picture(
        "layers", "The layers", words, {"data": data, "layout": layout}, _layers_table(widths, losses, ranks), 190 * len(rows) + 90
    )


def curve_picture(curve: Sequence[CurvePoint], best_step: int | None, unit: str = LOSS_UNITS["language"]) -> Picture | None:
    """Draws the losses while recovering."""
    if not curve:
        return None
    train = [(point.step, point.train_nats) for point in curve if point.train_nats is not None]
    held = [(point.step, point.held_out_nats) for point in curve if point.held_out_nats is not None]
    data = [
        _trace("training", train, GONE, "lines"),
        _trace("held out", held, KEPT, "lines+markers"),
        _trace(f"kept: step {best_step}", [point for point in held if point[0] == best_step], SECOND, "markers", size=13),
    ]
    layout = _layout("optimizer steps") | {"yaxis": {"title": {"text": f"loss, {unit}"}}}
    table = [["step", f"training, {unit}", f"held out, {unit}"]]
    table += [[str(point.step), _number(point.train_nats), _number(point.held_out_nats)] for point in curve]
    words = f"Training and held-out loss over {curve[-1].step} steps; step {best_step} was kept, which has the lowest held-out loss."
    return Picture("curve", "Loss while recovering", words, {"data": data, "layout": layout}, table)


def search_picture(search: RankSearch | None) -> Picture | None:
    """Draws what a search for ranks measured, trial after trial, and how well its model of the losses predicted."""
    if search is None or not search.trials:
        return None
    measured = [(index + 1, trial.loss_nats) for index, trial in enumerate(search.trials) if trial.kind == "recovery" and trial.loss_nats]
    elastic = [(index + 1, trial.loss_nats) for index, trial in enumerate(search.trials) if trial.kind == "elastic" and trial.loss_nats]
    data = [_trace("recovery", measured, KEPT, "markers"), _trace("elastic score", elastic, GONE, "markers")]
    layout = _layout("measurement") | {"yaxis": {"title": {"text": "held-out loss, nats"}}}
    words = f"{len(search.trials)} measurements of rank vectors. {search.verdict[:1].upper()}{search.verdict[1:]}."
    if search.refits:
        data.append(
            _trace("prediction: rank correlation", [(one.trials, one.rank_correlation) for one in search.refits], SECOND, "lines+markers")
        )
        data[-1]["yaxis"] = "y2"
        layout["yaxis2"] = {"overlaying": "y", "side": "right", "range": [-1.05, 1.05], "title": {"text": "correlation"}, "showgrid": False}
        last = search.refits[-1]
        words += f" Predictions for trials left out agreed in order with {last.rank_correlation:+.2f} at the end (R² {last.r2:+.2f})."
    table = [["number", "origin", "ranks", "held-out loss, nats"]]
    for index, (trial, origin) in enumerate(zip(search.trials, search.origins, strict=True)):
        table.append([str(index + 1), origin, " ".join(map(str, trial.ranks)), _number(trial.loss_nats) or trial.note])
    return Picture("search", "Search for ranks", words, {"data": data, "layout": layout}, table)


def front_picture(past: Sequence[PastRun]) -> Picture | None:
    """Draws size against loss of all runs that were measured on the same text, with those that no other beats in both."""
    if len({one.run for one in past}) < 2:
        return None
    best = front_of(past)
    data: list[dict[str, Any]] = [
        {
            **_trace("runs", [(one.parameters, one.loss_nats) for one in past], GONE, "markers", size=9),
            "text": [escape(f"{one.run}: {one.label}") for one in past],
            "hovertemplate": "%{text}<br>%{x:,} parameters<br>%{y:.4f} nats<extra></extra>",
        },
        _trace("not beaten in both", [(one.parameters, one.loss_nats) for one in best], KEPT, "lines+markers", size=10),
        _trace("this run", [(one.parameters, one.loss_nats) for one in past if one.current], SECOND, "markers", size=15),
    ]
    data[1]["line"] = {"shape": "hv", "color": KEPT}
    data[2]["marker"] = {"color": SECOND, "size": 15, "symbol": "diamond-open", "line": {"width": 3}}
    layout = _layout("parameters") | {"yaxis": {"title": {"text": "loss, nats a token"}}}
    table = [["run", "model", "parameters", "loss, nats", "beaten by none"]]
    table += [[one.run, one.label, f"{one.parameters:,}", f"{one.loss_nats:.4f}", "yes" if one in best else "no"] for one in past]
    runs = len({one.run for one in past})
    words = f"{len(past)} models of {runs} runs on the same text; {len(best)} are beaten by none in both size and loss."
    return Picture("front", "Size against loss, over all runs", words, {"data": data, "layout": layout}, table)


def _ranks(report: RunReport) -> dict[str, int]:
    if report.factors is not None:
        return {entry.module: entry.rank for entry in report.factors.factorings}
    plan = report.ranks.plan if report.ranks is not None else report.rank_plan
    return dict(plan.ranks) if plan is not None else {}


def _by_kind(values: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Returns values of names such as ``layers.3.mlp.down_proj`` by kind (``down_proj``) and layer (3); other names are left out."""
    found: dict[str, dict[int, Any]] = {}
    for name, value in values.items():
        match = _OF_LAYER.search(name)
        if match is not None:
            found.setdefault(match[2].rpartition(".")[2], {})[int(match[1])] = value
    return found


def _matters(losses: Mapping[str, Mapping[int, float]]) -> bool:
    return any(value > 0 for kind in losses.values() for value in kind.values())


def _axis(row: str) -> dict[str, Any]:
    names = {"damage": "importance<br>removed", "ranks": "rank", "ffn": "channels", "heads": "KV heads", "query_heads": "query heads"}
    return {"text": names.get(row, escape(row)), "standoff": 8}


def _bars(kind: str, values: Mapping[int, tuple[int, int]], where: Mapping[str, str], *, first: bool) -> list[dict[str, Any]]:
    layers = list(values)
    shown = {"type": "bar", "x": layers, "showlegend": first, **where}
    before, after = [values[layer][0] for layer in layers], [values[layer][1] for layer in layers]
    share = [f"{kept:,} of {all_:,} ({kept / max(all_, 1):.0%})" for all_, kept in zip(before, after, strict=True)]
    hover = f"layer %{{x}}<br>{escape(kind)}: %{{text}}<extra></extra>"
    return [
        shown | {"y": before, "name": "before", "marker": {"color": GONE, "opacity": 0.45}, "hoverinfo": "skip", "width": 0.8},
        shown
        | {
            "y": after,
            "name": "kept",
            "marker": {"color": KEPT},
            "text": share,
            "textposition": "none",
            "hovertemplate": hover,
            "width": 0.8,
        },
    ]


def _line(kind: str, values: Mapping[int, float], where: Mapping[str, str], colour: str) -> dict[str, Any]:
    points = sorted(values.items())
    name = f"importance removed: {kind}"
    return _trace(name, points, colour, "lines+markers") | dict(where)


def _heat(ranks: Mapping[str, Mapping[int, int]], layers: int, where: Mapping[str, str]) -> dict[str, Any]:
    rows = [[kind.get(layer) for layer in range(layers)] for kind in ranks.values()]
    hover = "layer %{x}, %{y}: rank %{z}<extra></extra>"
    shown = {"type": "heatmap", "z": rows, "x": list(range(layers)), "y": [escape(kind) for kind in ranks], "colorscale": SCALE}
    return shown | {
        "hovertemplate": hover,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 12, "title": {"text": "rank"}, "len": 0.4, "y": 0.15},
        **where,
    }


def _trace(name: str, points: Sequence[tuple[float, float | None]], colour: str, mode: str, size: int = 7) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": mode,
        "name": escape(name),
        "x": [x for x, _ in points],
        "y": [y if y is not None and math.isfinite(y) else None for _, y in points],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": size},
    }


def _layout(x: str) -> dict[str, Any]:
    return {
        "barmode": "overlay",
        "margin": {"l": 60, "r": 20, "t": 10, "b": 45},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": x}},
    }


def _layers_table(widths: Mapping[str, Any], losses: Mapping[str, Any], ranks: Mapping[str, Any]) -> list[list[str]]:
    """Returns a row for each layer: kept of all units of each kind, importance removed, and ranks."""
    layers = sorted({layer for kinds in (widths, losses, ranks) for kind in kinds.values() for layer in kind})
    heading = [
        "layer",
        *(f"{kind} kept" for kind in widths),
        *(f"{kind} importance removed" for kind in losses),
        *(f"rank {kind}" for kind in ranks),
    ]
    rows: list[list[str]] = []
    for layer in layers:
        kept = [f"{kind[layer][1]} of {kind[layer][0]}" if layer in kind else "" for kind in widths.values()]
        lost = [f"{kind[layer]:.4g}" if layer in kind else "" for kind in losses.values()]
        rows.append([str(layer), *kept, *lost, *(str(kind.get(layer, "")) for kind in ranks.values())])
    return [heading, *rows]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
