"""Answers for equal layers are compared as wholes: what all layers lose together is not the sum of what each loses alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune.at_once import better_at_once
from regraft.plans import Cut, PrunePlan, Scores
from regraft.selection import Budget, select
from regraft.selection.budget import best_units


def test_the_even_share_is_taken_where_it_does_less_harm(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 0::2] = 0.0  # these channels do nothing
    view, text = ModelView(model), torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    groups = discover(view, ("heads", "ffn"))
    budget = Budget(0.1, "uniform", tuple(range(groups.layers)), ("heads", "ffn"), 1)

    def scores(sign: float) -> Scores:
        return Scores(
            groups.fingerprint, "planted", {group.name: tuple(sign * (u % 2) for u in range(group.units)) for group in groups.groups}
        )

    idle = replace(select("uniform", groups, scores(1.0), budget), selection="knapsack")
    needed = replace(select("uniform", groups, scores(-1.0), budget), selection="knapsack")
    heads = replace(idle, cuts=tuple(Cut(group.name, best_units((1.0, 2.0, 3.0), 2)) for group in groups.of("heads")))

    def better(plan: PrunePlan, sign: float) -> tuple[PrunePlan, list[str]]:
        said: list[str] = []
        return better_at_once(
            view, groups, scores(sign), budget, plan, text, auto_align=False, say=lambda line: said.append(str(line))
        ), said

    assert better(heads, 1.0)[0] == idle
    assert len(better(heads, 1.0)[1]) == 1
    assert better(idle, -1.0) == (idle, [])  # the even share removes what is needed
    assert better(needed, -1.0) == (needed, [])
