"""The cut leaves its model alone, keeps tied weights tied, and can be repeated; for families and modes see conformance."""

from __future__ import annotations

import pytest
import torch

from regraft.groups.declared import discover
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Cut
from regraft.surgery.cut import cut
from slicing import Kept, ids, zeroed
from verdicts import plan_for

KEPT = [Kept((0, 2), range(0, 64, 2)), Kept((1,), range(5, 64)), Kept((0, 1), range(64))]


@pytest.mark.parametrize("tied", [False, True])
def test_tied_or_not_removed_equals_zeroed(make_model, tied):
    model = make_model("qwen2", tie_word_embeddings=tied)
    groups = discover(ModelView(model))
    cuts = tuple(Cut(f"layers.{layer}.heads", tuple(kept.groups)) for layer, kept in enumerate(KEPT))
    cuts += tuple(Cut(f"layers.{layer}.ffn", tuple(kept.channels)) for layer, kept in enumerate(KEPT[:2]))
    pruned = cut(model, groups, plan_for(groups, cuts))
    assert (pruned.lm_head.weight is pruned.get_input_embeddings().weight) == tied
    with torch.no_grad():
        before, got, want = (one(ids(model)).logits for one in (model, pruned, zeroed(model, KEPT)))
    assert (got - want).abs().max() <= 1e-5
    assert (before - want).abs().max() > 1e-2, "the cut must matter, or the test proves nothing"
    removed = sum((groups.named()[c.group].units - len(c.kept)) * groups.named()[c.group].unit_parameters for c in cuts)
    assert parameter_count(pruned) == groups.parameters - removed


def test_the_original_is_left_alone(make_model):
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = discover(ModelView(model))
    cut(model, groups, plan_for(groups, (Cut("layers.1.ffn", (0, 1, 2)),)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pruned_model_is_pruned_again(make_model):
    model = make_model("llama")
    groups = discover(ModelView(model))
    once = cut(model, groups, plan_for(groups, (Cut("layers.1.ffn", tuple(range(40))), Cut("layers.2.heads", (0, 1)))))
    again = discover(ModelView(once))
    assert {group.name: group.units for group in again.groups} == {
        "layers.0.heads": 3,
        "layers.0.ffn": 64,
        "layers.1.heads": 3,
        "layers.1.ffn": 40,
        "layers.2.heads": 2,
        "layers.2.ffn": 64,
    }
    twice = cut(once, again, plan_for(again, (Cut("layers.1.ffn", tuple(range(20))),)))
    straight = cut(model, groups, plan_for(groups, (Cut("layers.1.ffn", tuple(range(20))), Cut("layers.2.heads", (0, 1)))))
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(twice(ids).logits, straight(ids).logits)
