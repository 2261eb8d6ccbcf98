"""Removing a unit gives the logits that zeroing it gives, for every family, heads and feed-forward channels."""

from __future__ import annotations

import pytest
import torch

from regraft.groups.declared import discover
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Cut, PrunePlan
from regraft.surgery.cut import cut

KEPT_HEADS = {0: (0, 2), 1: (1,), 2: (0, 1)}
KEPT_FFN = {0: tuple(range(0, 64, 2)), 1: tuple(range(5, 64)), 2: tuple(range(64))}


def plan_for(groups, cuts):
    return PrunePlan(groups.fingerprint, "planted", "planted", "per-layer", 0.1, 1, groups.parameters, groups.parameters, cuts)


def zeroed(model):
    """The independent answer: written for the attention and FFN of these four families, by row and column."""
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    width = config.head_dim
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for head in set(range(config.num_key_value_heads)) - set(KEPT_HEADS[index]):
                columns = slice(head * repeats * width, (head + 1) * repeats * width)
                layer.self_attn.o_proj.weight[:, columns] = 0.0
            for channel in set(range(config.intermediate_size)) - set(KEPT_FFN[index]):
                layer.mlp.down_proj.weight[:, channel] = 0.0
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_pruned_equals_zeroed(make_model, family, tied):
    model = make_model(family, tie_word_embeddings=tied)
    groups = discover(ModelView(model))
    cuts = tuple(Cut(f"layers.{layer}.heads", kept) for layer, kept in KEPT_HEADS.items())
    cuts += tuple(Cut(f"layers.{layer}.ffn", kept) for layer, kept in KEPT_FFN.items() if len(kept) < 64)
    pruned = cut(model, groups, plan_for(groups, cuts))
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(ids).logits
        got = pruned(ids).logits
        want = zeroed(model)(ids).logits
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
