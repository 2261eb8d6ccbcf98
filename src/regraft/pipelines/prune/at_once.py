"""The knapsack's answer for equal layers, beside the same share of every kind: both are cut and measured.

Curves are measured with one group cut, and the knapsack adds them up. Where all layers lose the same, that is far from what they lose
together: half of the attention is little in any layer, and much in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regraft.errors import InputError
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, mean_divergence
from regraft.plans import Groups, PrunePlan, Scores
from regraft.progress import Say
from regraft.selection import Budget, select
from regraft.surgery.cut import cut
from regraft.surgery.damage_curves import JUDGED_WINDOWS


def better_at_once(
    view: ModelView, groups: Groups, scores: Scores, budget: Budget, plan: PrunePlan, windows_NT: Tensor, *, auto_align: bool, say: Say
) -> PrunePlan:
    """Returns a plan, or the same share of every kind by the same scores where its model, cut and not re-fitted, diverges less.

    Args:
        view: The dense model; left as it is.
        groups: Groups of the model.
        scores: Scores of the model.
        budget: The budget that the plan was made for.
        plan: The plan.
        windows_NT: Calibration tokens, int64 (windows, tokens); the last 16 at most are read.
        auto_align: Whether the alignment of the even share is chosen too.
        say: Called with a line where the even share is better.
    """
    try:
        even = select("uniform", groups, scores, budget, auto_align=auto_align)
    except InputError:  # no even share of so few units comes near the ratio
        return plan
    if even.cuts == plan.cuts:
        return plan
    ours, shared = _divergences(view, groups, (plan, even), windows_NT[-JUDGED_WINDOWS:])
    if ours <= shared:
        return plan
    say(
        f"the same share of every kind is taken: it loses {shared:.3f} nats a token in all layers at once, the knapsack's answer {ours:.3f}"
    )
    return replace(even, selection=plan.selection)


@torch.no_grad()
def _divergences(view: ModelView, groups: Groups, plans: Sequence[PrunePlan], windows_NT: Tensor) -> list[float]:
    """Returns how far the predictions of each plan's model are from the dense ones, in nats a token."""
    batches = windows_NT.to(view.model.device).split(1)
    with float32_on_cpu(view.model):
        dense = [log_probabilities(view.model(input_ids=ids, use_cache=False).logits) for ids in batches]
    found: list[float] = []
    for plan in plans:
        pruned = cut(view.model, groups, plan)
        with float32_on_cpu(pruned):
            found.append(mean_divergence((pruned(input_ids=ids, use_cache=False).logits for ids in batches), dense))
    return found
