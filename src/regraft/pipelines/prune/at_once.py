"""The knapsack's answer beside a simpler one, where its sum of curves says too little: both are cut and measured.

For equal layers the other is the same share of every kind; where tokens go too, it is the answer without them.

Curves are measured with one group cut, and the knapsack adds them up. Where all layers lose the same, that is far from what they lose
together: half of the attention is little in any layer, and much in all of them. Both models are therefore made as the result will be, their
projections re-fitted where that is asked for, on a part of the text, and judged on windows that the re-fit does not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.models.precision import float32_on_cpu
from regraft.models.view import ModelView
from regraft.numerics.divergence import log_probabilities, mean_divergence
from regraft.pipelines.prune.priced_tokens import PricedTokens, within_layers
from regraft.plans import Groups, PrunePlan, Scores
from regraft.progress import Say
from regraft.selection import Budget, select
from regraft.surgery.apply_plan import apply_plan
from regraft.surgery.cut import cut
from regraft.surgery.damage_curves import JUDGED_WINDOWS
from regraft.surgery.refit_layerwise import RefitMethod
from regraft.surgery.vocabulary import VOCABULARY

FITTED_WINDOWS = 32  # enough to rank two shapes, for a quarter of the time of the re-fit that follows


@dataclass(frozen=True)
class Making:
    """How the models that are compared are made.

    Attributes:
        view: The dense model; left as it is.
        groups: Groups of the model.
        windows_NT: Calibration tokens, int64 (windows, tokens); the last of them judge, the first of the others are fitted to.
        refit: Method of re-fitting the reading projections; None for a cut alone.
        bridged: Whether gaps that removed layers leave are bridged.
    """

    view: ModelView
    groups: Groups
    windows_NT: Tensor
    refit: RefitMethod | None
    bridged: bool = False

    @property
    def fits(self) -> bool:
        """Whether anything is fitted to the text."""
        return self.refit is not None or self.bridged

    @property
    def judging_NT(self) -> Tensor:
        """Windows that no re-fit reads, int64 (windows, tokens); all of the last ones where nothing is re-fitted."""
        most = max(1, len(self.windows_NT) // 4) if self.fits else len(self.windows_NT)
        return self.windows_NT[-min(JUDGED_WINDOWS, most) :]

    def of(self, plan: PrunePlan) -> PreTrainedModel:
        """Returns the model of a plan."""
        if not plan.cuts:
            return self.view.model
        if not self.fits:
            return cut(self.view.model, self.groups, plan)
        rest_NT = self.windows_NT[: -len(self.judging_NT)] if len(self.windows_NT) > 1 else self.windows_NT
        return apply_plan(self.view, self.groups, plan, rest_NT[:FITTED_WINDOWS], self.refit, bridged=self.bridged)


def better_at_once(making: Making, scores: Scores, budget: Budget, plan: PrunePlan, *, auto_align: bool, say: Say) -> PrunePlan:
    """Returns a plan, or the same share of every kind by the same scores where its model diverges less from the dense one.

    Args:
        making: How both models are made.
        scores: Scores of the model.
        budget: The budget that the plan was made for.
        plan: The plan.
        auto_align: Whether the alignment of the even share is chosen too.
        say: Called with a line where the even share is better.
    """
    try:
        even = select("uniform", making.groups, scores, budget, auto_align=auto_align)
    except InputError:  # no even share of so few units comes near the ratio
        return plan
    if even.cuts == plan.cuts:
        return plan
    say("comparing the knapsack's answer with the same share of every kind, in all layers at once")
    ours, shared = _divergences(making, (plan, even))
    if ours <= shared:
        return plan
    say(
        f"the same share of every kind is taken: it loses {shared:.3f} nats a token in all layers at once, the knapsack's answer {ours:.3f}"
    )
    return replace(even, selection=plan.selection)


def better_with_tokens(making: Making, tokens: PricedTokens, plan: PrunePlan, alone: PrunePlan, say: Say) -> PrunePlan:
    """Returns a plan that removes tokens too, or one of the same budget without them where its model predicts text better.

    What widths cost is a divergence, and what tokens cost a difference of losses. The two are alike only where the model's predictions are
    right: on text that it does not know, narrower layers move predictions far without making them much worse.

    Args:
        making: How both models are made.
        tokens: Tokens that may go, and text that they were not counted on.
        plan: A plan that names tokens by their places in the order.
        alone: A plan without tokens.
        say: Called with a line on what is compared.
    """
    if all(entry.group != VOCABULARY for entry in plan.cuts):
        return plan
    say("comparing fewer tokens with all of them at the same number of parameters")
    ours, whole = (tokens.loss(making.of(within_layers(making.groups, one)), one) for one in (plan, alone))
    if ours <= whole:
        return plan
    say(f"all tokens stay: {whole:.4f} nats a byte on text that they were not counted on, against {ours:.4f} with fewer")
    return alone


@torch.no_grad()
def _divergences(making: Making, plans: Sequence[PrunePlan]) -> list[float]:
    """Returns how far the predictions of each plan's model are from the dense ones, in nats a token."""
    dense_model = making.view.model
    batches = making.judging_NT.to(dense_model.device).split(1)
    with float32_on_cpu(dense_model):
        dense = [log_probabilities(dense_model(input_ids=ids, use_cache=False).logits) for ids in batches]
    found: list[float] = []
    for plan in plans:
        pruned = making.of(plan)
        with float32_on_cpu(pruned):
            found.append(mean_divergence((pruned(input_ids=ids, use_cache=False).logits for ids in batches), dense))
    return found
