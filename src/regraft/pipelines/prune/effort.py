"""Effort as a word: how much calibration text, how many measurements, and which re-fits pruning takes.

A pass is one run of all calibration windows forwards through the model. Estimates count passes: a gradient costs two, and the products
of second moments about half of one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.importance import CRITERIA
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.plans import WHOLE, Groups
from regraft.selection import SELECTORS
from regraft.settings import PruneSettings
from regraft.surgery.damage_curves import JUDGED_WINDOWS, SHARES


@dataclass(frozen=True)
class Effort:
    """Meaning of one value of the setting ``effort``.

    Attributes:
        samples: Number of calibration windows where none is asked for.
        near_windows: Number of windows that measure each group once, near the width it is given, where its curve is predicted.
        all_sizes: Whether curves are measured at all sizes although they could be predicted.
        predictions: Whether projections are re-fitted to the dense model's predictions too.
        steps: Largest number of natural-gradient steps.
        least_gain: A step that lessens the divergence by a smaller share than this is the last one.
    """

    samples: int
    near_windows: int
    all_sizes: bool
    predictions: bool
    steps: int
    least_gain: float


EFFORTS = {
    "quick": Effort(samples=32, near_windows=1, all_sizes=False, predictions=False, steps=0, least_gain=0.0),
    "default": Effort(samples=128, near_windows=4, all_sizes=False, predictions=True, steps=4, least_gain=0.05),
    "thorough": Effort(samples=128, near_windows=JUDGED_WINDOWS, all_sizes=True, predictions=True, steps=4, least_gain=0.0),
}


def passes_of(settings: PruneSettings, groups: Groups, windows: int) -> float:
    """Returns about how many passes pruning takes at most, with every "auto" decided.

    Args:
        settings: Resolved settings.
        groups: Groups of the model.
        windows: Number of calibration windows.
    """
    effort, criterion = EFFORTS[settings.effort], CRITERIA.get(settings.criterion)
    units = sum(group.kind not in WHOLE and group.kind != "residual" for group in groups.groups)
    total = 0.0
    if criterion.needs_text:
        total += 3.5 if criterion.looks_at == "gradients" else 1.5
    if SELECTORS.get(settings.select).needs_curves:
        predicted = criterion.in_nats and not effort.all_sizes
        judged = effort.near_windows if predicted else min(JUDGED_WINDOWS, max(1, windows // 4))
        each = 1 if predicted else len(SHARES)
        total += (0.0 if predicted else 1.5) + 0.6 * each * units * judged / max(1, windows)  # only the layers above are run again
    if settings.reconstruct in ("least_squares", "mean", "divergence"):
        total += 2.5
    if settings.reconstruct == "divergence":
        total += 6.0 * effort.steps
    return total * settings.rounds


@torch.no_grad()
def seconds_of_a_pass(view: ModelView, windows_NT: Tensor) -> float:
    """Returns about how long all windows take through a model, from one of them, run twice."""
    ids = windows_NT[:1].to(view.model.device)
    best = float("inf")
    with float32_on_cpu(view.model):
        for _ in range(2):
            start = time.perf_counter()
            view.model(input_ids=ids, use_cache=False).logits.sum().item()
            best = min(best, time.perf_counter() - start)
    return best * len(windows_NT)


def forecast(view: ModelView, groups: Groups, settings: PruneSettings, windows_NT: Tensor) -> str:
    """Returns what pruning will take, in a line: passes, and minutes on this machine now."""
    passes = passes_of(settings, groups, len(windows_NT))
    minutes = passes * seconds_of_a_pass(view, windows_NT) / 60
    return f"effort {settings.effort}: at most about {passes:.0f} passes over the calibration text, {minutes:.1f} minutes on this machine"
