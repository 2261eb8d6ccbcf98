"""Effort as a word: how much calibration text, how many measurements, and which re-fits pruning takes.

A pass is one run of all calibration windows forwards through the model. Estimates count passes: a gradient costs one or two, and the
products of second moments about half of one. What does not depend on the text, the linear algebra, is counted in operations. Steps to the
predictions end when one gains little; the estimate counts as many as were usually taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.importance import CRITERIA
from regraft.importance.reader_moments import FEWEST_GRADIENTS, GRADIENT_SHARE
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.plans import WHOLE, Group, Groups
from regraft.selection import SELECTORS
from regraft.settings import PruneSettings
from regraft.surgery.damage_curves import JUDGED_WINDOWS, SHARES, measured_layers
from regraft.surgery.gates import BATCH as GATE_BATCH
from regraft.surgery.gates import STEPS as GATE_STEPS

_PROBED, _PROBED_WIDTH = 4, 512


@dataclass(frozen=True)
class Effort:
    """Meaning of one value of the setting ``effort``.

    Attributes:
        samples: Number of calibration windows where none is asked for.
        source_windows: Number of windows that judge each of several sources, and that nothing is fitted to. A divergence has a smaller
            spread than a loss, so that a few are enough to rank sources.
        near_windows: Number of windows that measure each group once, near the width it is given, where its curve is predicted.
        all_sizes: Whether curves are measured at all sizes although they could be predicted.
        predictions: Whether projections are re-fitted to the dense model's predictions too.
        steps: Largest number of natural-gradient steps.
        usual_steps: How many of them the forecast counts.
        least_gain: A step that lessens the divergence by a smaller share than this is the last one. The next would gain about half as much.
    """

    samples: int
    source_windows: int
    near_windows: int
    all_sizes: bool
    predictions: bool
    steps: int
    usual_steps: int
    least_gain: float


EFFORTS = {
    "quick": Effort(
        samples=32, source_windows=2, near_windows=1, all_sizes=False, predictions=False, steps=0, usual_steps=0, least_gain=0.0
    ),
    "default": Effort(
        samples=128, source_windows=4, near_windows=4, all_sizes=False, predictions=True, steps=4, usual_steps=1, least_gain=0.1
    ),
    "thorough": Effort(
        samples=128, source_windows=4, near_windows=JUDGED_WINDOWS, all_sizes=True, predictions=True, steps=4, usual_steps=4, least_gain=0.0
    ),
}


def passes_of(settings: PruneSettings, groups: Groups, windows: int) -> float:
    """Returns about how many passes pruning takes, with every "auto" decided.

    Args:
        settings: Resolved settings.
        groups: Groups of the model.
        windows: Number of calibration windows.
    """
    effort, criterion = EFFORTS[settings.effort], CRITERIA.get(settings.criterion)
    units = _cut_inside(groups)
    total = 0.0
    gradients = max(FEWEST_GRADIENTS, windows // GRADIENT_SHARE) / max(1, windows)
    if criterion.needs_text:
        total += 1.4 + 1.2 * min(1.0, gradients) if criterion.in_nats else 3.5 if criterion.looks_at == "gradients" else 1.5
    if SELECTORS.get(settings.select).needs_curves:
        predicted = criterion.in_nats and not effort.all_sizes
        judged = effort.near_windows if predicted else min(JUDGED_WINDOWS, max(1, windows // 4))
        near = set(measured_layers(groups.layers))
        runs = sum(group.layer in near for group in units) if predicted else len(SHARES) * len(units)
        total += (1.0 if predicted else 1.5) * judged / max(1, windows) + 0.6 * runs * judged / max(1, windows)  # the layers above
    if SELECTORS.get(settings.select).learned:
        total += 4.0 * GATE_STEPS * GATE_BATCH / max(1, windows)  # the dense model, and the gated one forwards and back
    if settings.reconstruct in ("least_squares", "mean", "divergence"):
        total += 1.8
    if settings.reconstruct == "divergence":
        judged = min(JUDGED_WINDOWS, max(1, windows // 4)) / max(1, windows)
        total += 1.5 + 2.0 * judged + (2.5 + 4.0 * judged) * effort.usual_steps
    return total * settings.rounds


def _cut_inside(groups: Groups) -> list[Group]:
    return [group for group in groups.groups if group.kind not in WHOLE and group.kind != "residual"]


def _matrix_operations(view: ModelView, groups: Groups, settings: PruneSettings) -> float:
    """Returns the operations of linear algebra in float64: removal orders, and re-fits at a few dampings, of every projection that reads.

    They grow with the cube of a width and not with the text, so that passes do not count them.
    """
    total = 0.0
    for group in _cut_inside(groups):
        weight = view.model.get_parameter(group.reader.parameter)
        wide = group.units * group.reader.width
        out = weight.numel() / weight.shape[group.reader.axis]
        kept = (1.0 - settings.ratio) * wide
        if CRITERIA.get(settings.criterion).name.startswith("surgeon"):
            total += 2.0 * out * wide**2 + 4.0 * wide**3
        if settings.reconstruct in ("least_squares", "divergence"):
            total += 4.0 * out * wide**2 + 4.0 * (kept**3 / 3.0 + 4.0 * out * kept**2)
        if settings.reconstruct == "divergence":
            total += EFFORTS[settings.effort].usual_steps * (out**3 / 3.0 + kept**3 / 3.0 + 2.0 * out * kept * (out + kept))
    return total * settings.rounds


@torch.no_grad()
def seconds_of_a_pass(view: ModelView, windows_NT: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns about how long all windows take through a model, from a few of them, after a first run of one."""
    ids = windows_NT[:_PROBED].to(view.model.device)
    with float32_on_cpu(view.model):
        view.model(input_ids=ids[:1], use_cache=False).logits.sum().item()
        start = clock()
        view.model(input_ids=ids, use_cache=False).logits.sum().item()
        return (clock() - start) * len(windows_NT) / len(ids)


def _seconds_of_matrices(operations: float, device: torch.device, clock: Callable[[], float]) -> float:
    """Returns about how long they take, from a product that is timed; factorizations reach about half of its speed."""
    matrix = torch.ones(_PROBED_WIDTH, _PROBED_WIDTH, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    best = float("inf")
    for _ in range(3):
        start = clock()
        (matrix @ matrix).sum().item()
        best = min(best, clock() - start)
    return 2.0 * operations * best / (2.0 * _PROBED_WIDTH**3)


def seconds_of(view: ModelView, groups: Groups, settings: PruneSettings, windows_NT: Tensor, clock: Callable[[], float]) -> float:
    """Returns about how long pruning will take by a clock.

    Args:
        view: The model.
        groups: Groups of the model.
        settings: Resolved settings.
        windows_NT: Calibration tokens, int64 (windows, tokens).
        clock: A function whose differences are durations.
    """
    seconds = passes_of(settings, groups, len(windows_NT)) * seconds_of_a_pass(view, windows_NT, clock)
    return seconds + _seconds_of_matrices(_matrix_operations(view, groups, settings), view.model.device, clock)


def forecast(view: ModelView, groups: Groups, settings: PruneSettings, windows_NT: Tensor) -> str:
    """Returns what pruning will take, in a line: passes, and minutes on this machine now."""
    passes = passes_of(settings, groups, len(windows_NT))
    minutes = seconds_of(view, groups, settings, windows_NT, time.perf_counter) / 60
    return f"effort {settings.effort}: about {passes:.0f} passes over the calibration text, {minutes:.1f} minutes on this machine"
