"""The loss curve of a run as inline SVG, without scripts, fonts or other files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from regraft.plans import LOSS_UNITS
from regraft.report.summary import CurvePoint

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 120, 14, 40
TRAIN, HELD_OUT = "#9aa7b5", "#0b6bcb"


def loss_curve(points: Sequence[CurvePoint], best_step: int | None = None, unit: str = LOSS_UNITS["language"]) -> str:
    """Draws training and held-out loss over the steps.

    Args:
        points: Losses in the order of the steps.
        best_step: The step whose weights were kept; it is marked on the held-out curve.
        unit: Unit of the losses.

    Returns:
        An ``<svg>`` element; an empty string when there is nothing to draw.
    """
    train = [(point.step, point.train_nats) for point in points if _usable(point.train_nats)]
    held_out = [(point.step, point.held_out_nats) for point in points if _usable(point.held_out_nats)]
    values = [value for _, value in (*train, *held_out) if value is not None]
    if not (train or held_out):
        return ""
    last = max(point.step for point in points) or 1
    low, high, step = _scale(min(values), max(values))
    x = _Axis(0, last, LEFT, WIDTH - RIGHT)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, step, unit), _line(train, x, y, TRAIN, "train"), _line(held_out, x, y, HELD_OUT, "held out")]
    kept = dict(held_out).get(best_step) if best_step is not None else None
    if best_step is not None and kept is not None:
        parts.append(f'<circle cx="{x(best_step)}" cy="{y(kept)}" r="4" fill="none" stroke="{HELD_OUT}"><title>kept</title></circle>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Loss in {unit} over optimizer steps" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


class _Axis:
    """A map from values to pixels, rounded so that the same run always gives the same text."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start, self._per_unit = start, (end - start) / (high - low)

    def __call__(self, value: float) -> str:
        return f"{self._start + (value - self.low) * self._per_unit:.1f}"


def _usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Returns round limits that enclose the values, and the distance of the grid lines."""
    span = max(high - low, 1e-3)
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    return math.floor(low / step) * step, (math.floor(high / step) + 1) * step, step


def _grid(x: _Axis, y: _Axis, step: float, unit: str) -> str:
    digits = max(0, -math.floor(math.log10(step)))
    parts: list[str] = []
    for index in range(round((y.high - y.low) / step) + 1):
        value = y.low + index * step
        parts.append(f'<line x1="{LEFT}" y1="{y(value)}" x2="{WIDTH - RIGHT}" y2="{y(value)}" stroke="#e3e7ec"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value)}" dy="4" text-anchor="end" fill="#556">{value:.{digits}f}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = round(x.high * share)
        parts.append(f'<text x="{x(at)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#556">{at}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" fill="#556">optimizer steps (loss in {unit})</text>')
    return "".join(parts)


def _line(points: Sequence[tuple[int, float | None]], x: _Axis, y: _Axis, colour: str, label: str) -> str:
    if not points:
        return ""
    path = " ".join(f"{x(step)},{y(value)}" for step, value in points if value is not None)
    height = TOP + (10 if label == "train" else 28)
    name = f'<text x="{WIDTH - RIGHT + 12}" y="{height}" fill="{colour}" font-weight="600">{label}</text>'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{name}'
