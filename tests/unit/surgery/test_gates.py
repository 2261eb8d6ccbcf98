"""Gates learned under the hard budget, against a planted answer and against a beginning that cannot be bettered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from folders import tiny_tokenizer
from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.pipelines.prune.prune import prune
from regraft.plans import Cut, Groups, PrunePlan, Scores
from regraft.selection import Budget, select
from regraft.selection.budget import best_units
from regraft.settings import PruneSettings
from regraft.surgery.gates import Gating, learn_gates

Make = Callable[..., PreTrainedModel]
TEXTS = [f"{number}. The quick brown fox jumps over {number * 7} lazy dogs, they say." for number in range(40)]
IDLE = 32  # channels of each feed-forward part, of 64, whose output nothing reads


@pytest.fixture
def planted(make_model: Make) -> PreTrainedModel:
    """A model in which every second channel of the feed-forward parts does nothing, and the others do much."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0.0
            layer.mlp.down_proj.weight[:, 1::2] *= 20.0
    return model


def gating(model: PreTrainedModel, values: Callable[[int], float]) -> tuple[Gating, Groups, PrunePlan]:
    view = ModelView(model)
    groups = discover(model, ("ffn",))
    scores = Scores(
        groups.fingerprint, "given", {group.name: tuple(values(unit) for unit in range(group.units)) for group in groups.groups}
    )
    gone = sum(group.unit_parameters for group in groups.groups) * IDLE / groups.parameters
    budget = Budget(gone, "per-layer", (0, 1, 2), ("ffn",), 1)
    plan = select("global", groups, scores, budget)
    kept = {group.name: best_units(scores.values[group.name], IDLE) for group in groups.groups}
    start = PrunePlan(**{**plan.__dict__, "cuts": tuple(Cut(name, units) for name, units in kept.items())})
    windows: Tensor = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(3))
    return Gating(view, groups, scores, budget, start, windows), groups, plan


def live_kept(groups: Groups, scores: Scores, budget: Budget) -> float:
    """Share of the working channels that stay."""
    plan = select("gates", groups, scores, budget)
    return sum(unit % 2 for entry in plan.cuts for unit in entry.kept) / (3 * IDLE)


@pytest.mark.slow
def test_gates_find_the_channels_that_work_from_a_beginning_that_is_mostly_wrong(planted: PreTrainedModel) -> None:
    """Three of four of the units that the beginning keeps do nothing."""
    given, groups, _ = gating(planted, lambda unit: float((unit % 2 == 0) != (unit % 8 < 2)))
    before = {name: value.clone() for name, value in planted.state_dict().items()}
    learned = learn_gates(given)
    started = live_kept(groups, given.scores, given.budget)
    assert started < 0.4
    assert live_kept(groups, learned, given.budget) > started + 0.3
    assert all(torch.equal(value, before[name]) for name, value in planted.state_dict().items())
    assert all(parameter.grad is None for parameter in planted.parameters())


@pytest.mark.slow
def test_a_beginning_that_nothing_betters_is_returned(planted: PreTrainedModel) -> None:
    given, groups, _ = gating(planted, lambda unit: float(unit % 2))
    assert live_kept(groups, learn_gates(given), given.budget) == 1.0


@pytest.mark.slow
def test_the_same_seed_learns_the_same(planted: PreTrainedModel) -> None:
    given, _, _ = gating(planted, lambda unit: float((unit * 7) % 13))
    assert learn_gates(given) == learn_gates(given)


@pytest.mark.slow
def test_pruning_by_gates_meets_the_budget(make_model: Make) -> None:
    settings = PruneSettings(ratio=0.4, select="gates", shape="per-layer", effort="quick", samples=16, seq_len=16, align=1)
    result = prune(make_model("llama"), None, settings, tokenizer=tiny_tokenizer(), calibration=TEXTS)
    assert result.plan.achieved == pytest.approx(0.4, abs=0.02)
    assert result.resolved.settings.select == "gates"


def test_what_gates_cannot_choose_is_refused_in_one_line(planted: PreTrainedModel) -> None:
    given, groups, plan = gating(planted, float)
    view = ModelView(planted)
    with pytest.raises(InputError, match="two calibration windows"):
        learn_gates(Gating(view, groups, given.scores, given.budget, plan, given.windows_NT[:1]))
    whole = discover(planted, ("layer",))
    scores = Scores(whole.fingerprint, "given", {group.name: (1.0,) for group in whole.groups})
    with pytest.raises(InputError, match="layer was asked for; use `select=knapsack`"):
        learn_gates(Gating(view, whole, scores, Budget(0.3, "per-layer", (0, 1, 2), ("layer",), 1), plan, given.windows_NT))
    with pytest.raises(InputError, match="only known to the knapsack"):
        prune(planted, None, PruneSettings(ratio=0.2, select="gates", budget="bytes"), tokenizer=tiny_tokenizer(), calibration=TEXTS)
