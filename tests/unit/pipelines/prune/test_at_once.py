"""Answers for equal layers are compared as wholes: what all layers lose together is not the sum of what each loses alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune.at_once import Making, better_at_once
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
        made = Making(view, groups, text, None)
        return better_at_once(made, scores(sign), budget, plan, auto_align=False, say=lambda line: said.append(str(line))), said

    assert better(heads, 1.0)[0] == idle
    assert len(better(heads, 1.0)[1]) == 2
    assert better(idle, -1.0)[0] == idle  # the even share removes what is needed
    assert better(needed, -1.0) == (needed, [])  # nothing is compared with itself


def test_answers_are_compared_as_the_result_will_be(make_model: Callable[..., PreTrainedModel]) -> None:
    """Channels that are copies of others are lost without harm where the others are re-fitted, and with harm where nothing is."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[1::2] = projection.weight[0::2]
            layer.mlp.down_proj.weight.mul_(8.0)
            layer.self_attn.o_proj.weight.mul_(0.05)
    view, text = ModelView(model), torch.randint(3, 90, (16, 16), generator=torch.Generator().manual_seed(0))
    groups = discover(view, ("heads", "ffn"))
    budget = Budget(0.1, "uniform", tuple(range(groups.layers)), ("heads", "ffn"), 1)
    scores = Scores(
        groups.fingerprint, "planted", {group.name: tuple(float(u % 2 == 0) for u in range(group.units)) for group in groups.groups}
    )
    copies = replace(select("uniform", groups, scores, budget), selection="knapsack")
    heads = replace(copies, cuts=tuple(Cut(group.name, best_units((1.0, 2.0, 3.0), 2)) for group in groups.of("heads")))

    def chosen(making: Making) -> PrunePlan:
        return better_at_once(making, scores, budget, heads, auto_align=False, say=lambda _line: None)

    cut_alone, fitted = Making(view, groups, text, None), Making(view, groups, text, "least_squares")
    assert chosen(cut_alone) == heads
    assert chosen(fitted) == copies
    assert len(cut_alone.judging_NT) == 16
    assert len(fitted.judging_NT) == 4  # the others are fitted to
