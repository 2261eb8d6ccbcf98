"""Answers for equal layers are compared as wholes: what all layers lose together is not the sum of what each loses alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune.at_once import Making, better_at_once, better_with_tokens
from regraft.pipelines.prune.priced_tokens import within_layers
from regraft.plans import Cut, PrunePlan, Scores
from regraft.selection import Budget, select
from regraft.selection.budget import best_units
from regraft.surgery.vocabulary import VOCABULARY


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


def test_tokens_stay_where_they_are_dearer_than_widths(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    view, text = ModelView(model), torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    groups = discover(view, ("ffn",))
    budget = Budget(0.1, "uniform", tuple(range(groups.layers)), ("ffn",), 1)
    scores = Scores(groups.fingerprint, "planted", {group.name: tuple(map(float, range(group.units))) for group in groups.groups})
    alone = select("uniform", groups, scores, budget)
    joint = replace(alone, cuts=(*alone.cuts[:1], Cut(VOCABULARY, (0, 1, 2))))

    def better(nats: float) -> tuple[PrunePlan, list[str]]:
        said: list[str] = []
        seen: list[int] = []

        def loss(narrower: PreTrainedModel, plan: PrunePlan) -> float:
            seen.append(narrower.num_parameters())
            return nats if any(entry.group == VOCABULARY for entry in plan.cuts) else 0.7

        tokens: Any = SimpleNamespace(loss=loss)
        found = better_with_tokens(Making(view, groups, text, None), tokens, joint, alone, lambda line: said.append(str(line)))
        # Both are judged with their widths cut, and the tokens still there.
        assert seen[0] == model.num_parameters() - (groups.parameters - within_layers(groups, joint).parameters_after)
        assert seen[1] == alone.parameters_after
        return found, said

    assert better(0.6)[0] is joint
    found, said = better(0.8)
    assert found is alone
    assert "all tokens stay: 0.7000 nats a byte on text that they were not counted on, against 0.8000 with fewer" in said[-1]
    untouched: Any = SimpleNamespace()
    assert better_with_tokens(Making(view, groups, text, None), untouched, alone, alone, lambda line: None) is alone
