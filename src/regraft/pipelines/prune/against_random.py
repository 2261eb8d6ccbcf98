"""The comparison of a pruned model with random removal of the same size: a choice that is no better than chance ends with a warning."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regraft.data.own_text import write_own_text
from regraft.data.tokens import context_limit
from regraft.errors import InputError
from regraft.importance import Evidence, score
from regraft.models.load import Loaded
from regraft.models.precision import float32_on_cpu
from regraft.plans import Groups, PrunePlan
from regraft.selection import Budget, select
from regraft.surgery.cut import cut

WINDOWS = 32
OWN_WINDOWS, OWN_TOKENS = 8, 32  # of text that the model writes, where nothing else read any
CLEARLY = 0.95  # share of the loss of chance that a clearly better choice stays below; few windows show no smaller difference


def windows_to_judge(loaded: Loaded, seed: int) -> Tensor:
    """Returns a few windows that a model writes, int64 (windows, tokens), for choices that read no text; none where it cannot write."""
    limit = context_limit(loaded.model.config)
    tokens = min(OWN_TOKENS, limit) if limit else OWN_TOKENS
    return write_own_text(loaded.model, loaded.tokenizer, OWN_WINDOWS, tokens, seed).windows_NT


def worse_than_random(
    model: PreTrainedModel, pruned: PreTrainedModel, groups: Groups, budget: Budget, plan: PrunePlan, windows_NT: Tensor, *, seed: int
) -> tuple[str, ...]:
    """Returns a warning where a pruned model is not clearly better than one that lost random units, the same share of every group.

    The random one is cut and nothing more, so that a warning is never the fault of the re-fit.

    Args:
        model: The dense model; it is left as it is.
        pruned: The pruned one.
        groups: Groups of the dense model.
        budget: What was to be removed.
        plan: What was removed.
        windows_NT: Calibration tokens, int64 (windows, tokens), of which a few are read.
        seed: Seed for the random units.
    """
    windows = windows_NT[:WINDOWS]
    if windows.shape[1] < 2 or any(group.kind not in ("heads", "query_heads", "ffn") for group in budget.prunable(groups)):
        return ()
    units = tuple(group for group in groups.groups if group in budget.prunable(groups))
    scores = score("random", Evidence(model, replace(groups, groups=units), None, seed))
    try:
        chance = select("uniform", groups, scores, replace(budget, align=plan.align))
    except InputError:  # no even share of so few units comes near the ratio
        return ()
    ours, theirs = _loss(pruned, windows), _loss(cut(model, groups, chance), windows)
    if ours <= CLEARLY * theirs:
        return ()
    return (
        f"no better or worse than random removal of the same size: {ours:.3f} nats a token on the text that was read, against {theirs:.3f} "
        "where random units go, the same share in every layer; choose another `criterion` or `select`",
    )


@torch.no_grad()
def _loss(model: PreTrainedModel, windows_NT: Tensor) -> float:
    """Returns the mean loss over windows of equal length, in nats for each token."""
    with float32_on_cpu(model):
        losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in windows_NT.to(model.device).split(1)]
    return sum(losses) / len(losses)
