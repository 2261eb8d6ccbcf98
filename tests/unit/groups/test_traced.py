"""Groups found by following the computation: against the declared tables, layouts written by hand, and models that cannot be followed."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, StableLmConfig, StableLmForCausalLM

from regraft.errors import ModelError
from regraft.groups.declared import discover
from regraft.groups.traced import follow_channels, trace
from regraft.groups.traced.rules import RULES
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Member

E, D, H, G, REP, I, V = 48, 8, 6, 3, 2, 64, 97  # noqa: E741 - hidden, head, heads, key-value heads, queries of each, ffn, vocabulary


def members(group):
    return {(m.parameter.split(".", 3)[-1] if ".layers." in m.parameter else m.parameter, *fields(m)) for m in group.members}


def fields(m: Member):
    return m.axis, m.side, m.offset, m.size, m.repeats, m.stride


@pytest.mark.slow
def test_a_form_of_an_operator_that_its_rule_does_not_know_is_refused_with_the_node(make_model, monkeypatch):
    monkeypatch.setitem(RULES, "softmax", lambda state, call: call.args[99])
    with pytest.raises(ModelError, match=r"node '\w*softmax\w*' .*does not know this form of the operator"):
        trace(make_model("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_agrees_with_the_declared_table(make_model, family, tied):
    model = make_model(family, tie_word_embeddings=tied)
    declared = discover(ModelView(model))
    traced = trace(model)
    same = tuple(group for group in traced.groups if group.kind in ("heads", "ffn"))
    assert replace(traced, groups=same) == declared


@pytest.mark.long
def test_agrees_on_an_unevenly_pruned_model(make_model):
    model = make_model("qwen3")
    for layer, width in ((0, 40), (2, 8)):
        mlp = model.model.layers[layer].mlp
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, nn.Linear(E, width, bias=False))
        mlp.down_proj = nn.Linear(width, E, bias=False)
    found = trace(model).named()
    assert [found[f"layers.{layer}.ffn"].units for layer in range(3)] == [40, 64, 8]
    same = tuple(group for group in trace(model).groups if group.kind in ("heads", "ffn"))
    assert same == discover(ModelView(model)).groups


@pytest.mark.slow
def test_query_heads_are_one_from_each_group(make_model):
    group = trace(make_model("llama")).named()["layers.1.query_heads"]
    assert group.units == REP
    assert group.members == (
        Member("model.layers.1.self_attn.q_proj.weight", 0, "out", 0, D, repeats=G, stride=REP * D),
        Member("model.layers.1.self_attn.o_proj.weight", 1, "in", 0, D, repeats=G, stride=REP * D),
    )
    assert group.unit_parameters == 2 * G * D * E


@pytest.mark.slow
def test_residual_width_of_a_llama(make_model):
    group = trace(make_model("llama")).named()["residual"]
    inside = ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    inside += ("mlp.up_proj", "input_layernorm", "post_attention_layernorm")
    wanted = {f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in inside}
    assert {m.parameter for m in group.members} == wanted | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert group.units == E
    per_layer = (REP + 1 + 1 + REP) * G * D + 3 * I + 2
    assert group.unit_parameters == 2 * V + 1 + 3 * per_layer


# Each family's own layout of its fused projections, from its documentation and its weights' shapes.
FUSED = {
    "gpt2": [("attn.c_attn.weight", 1, "out", part * E, D) for part in range(3)]
    + [("attn.c_attn.bias", 0, "out", part * E, D) for part in range(3)]
    + [("attn.c_proj.weight", 0, "in", 0, D)],
    "gpt_neox": [
        ("attention.query_key_value.weight", 0, "out", 0, 3 * D),
        ("attention.query_key_value.bias", 0, "out", 0, 3 * D),
        ("attention.dense.weight", 1, "in", 0, D),
    ],
    "falcon": [
        ("self_attention.query_key_value.weight", 0, "out", 0, (H + 2) * D),
        ("self_attention.dense.weight", 1, "in", 0, H * D),
    ],
    "falcon-grouped": [
        ("self_attention.query_key_value.weight", 0, "out", 0, (REP * 2 // 2 + 2) * D),
        ("self_attention.dense.weight", 1, "in", 0, REP * D),
    ],
    "phi3": [
        ("self_attn.qkv_proj.weight", 0, "out", 0, REP * D),
        ("self_attn.qkv_proj.weight", 0, "out", H * D, D),
        ("self_attn.qkv_proj.weight", 0, "out", (H + G) * D, D),
        ("self_attn.o_proj.weight", 1, "in", 0, REP * D),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(make_model, name):
    group = trace(make_model(name)).named()["layers.1.heads"]
    found = [(m.parameter.split(".1.")[1], m.axis, m.side, m.offset, m.size) for m in group.members]
    assert sorted(found) == sorted(FUSED[name])
    assert all(m.repeats == 1 for m in group.members)


@pytest.mark.slow
def test_gate_and_up_in_one_matrix(make_model):
    group = trace(make_model("phi3")).named()["layers.0.ffn"]
    assert [(m.parameter.split(".0.")[1], m.axis, m.offset, m.size) for m in group.members] == [
        ("mlp.gate_up_proj.weight", 0, 0, 1),
        ("mlp.gate_up_proj.weight", 0, I, 1),
        ("mlp.down_proj.weight", 1, 0, 1),
    ]
    assert (group.units, group.unit_parameters) == (I, 3 * E)


@pytest.mark.slow
def test_one_shared_key_value_head_still_has_query_heads(make_model):
    groups = trace(make_model("falcon")).named()
    assert groups["layers.0.heads"].units == 1
    queries = groups["layers.0.query_heads"]
    assert (queries.units, queries.unit_parameters) == (H, 2 * D * E)


@pytest.mark.slow
def test_full_width_norms_belong_to_the_heads_and_head_norms_to_none(make_model):
    full = {m.parameter.split(".0.")[1] for m in trace(make_model("olmo2")).named()["layers.0.heads"].members}
    assert {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} <= full
    inside = {m.parameter.split(".0.")[1] for m in trace(make_model("gemma3")).named()["layers.0.heads"].members}
    assert not {name for name in inside if "norm" in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("llama", {"self_attn", "input_layernorm"}, {"mlp", "post_attention_layernorm"}),
        (
            "gemma2",
            {"self_attn", "input_layernorm", "post_attention_layernorm"},
            {"mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"},
        ),
        ("olmo2", {"self_attn", "post_attention_layernorm"}, {"mlp", "post_feedforward_layernorm"}),
        ("falcon", {"self_attention"}, {"mlp"}),
        ("falcon-grouped", {"self_attention", "ln_attn"}, {"mlp", "ln_mlp"}),
        ("stablelm-parallel", {"self_attn"}, {"mlp"}),
        ("opt", {"self_attn", "self_attn_layer_norm"}, {"fc1", "fc2", "final_layer_norm"}),
        ("opt-350m", {"self_attn"}, {"fc1", "fc2"}),
    ],
)
def test_whole_parts_take_the_norms_that_serve_them_alone(make_model, name, attention, mlp):
    model = make_model(name)
    groups = trace(model).named()
    for kind, wanted in (("attention", attention), ("mlp", mlp)):
        group = groups[f"layers.2.{kind}"]
        assert {m.parameter.split(".2.")[1].split(".")[0] for m in group.members} == wanted
        inside = [p for n, p in model.named_parameters() if ".2." in n and n.split(".2.")[1].split(".")[0] in wanted]
        assert group.unit_parameters == sum(p.numel() for p in inside)
    layer = groups["layers.2.layer"]
    assert layer.unit_parameters == sum(p.numel() for n, p in model.named_parameters() if ".2." in n)


@pytest.mark.slow
def test_layer_norm_stands_in_the_way_of_the_residual_width(make_model):
    traced = follow_channels(make_model("gpt_neox"))
    assert "residual" not in traced.groups.named()
    (refusal,) = traced.refusals
    assert refusal.kind == "residual"
    assert "input_layernorm" in refusal.reason
    assert "mean" in refusal.reason


@pytest.mark.slow
def test_position_slopes_of_single_heads_are_noticed(make_model):
    for name in ("bloom", "falcon-alibi"):
        refused = {refusal.kind: refusal.reason for refusal in follow_channels(make_model(name)).refusals}
        assert "constant" in refused["heads"]


@pytest.mark.slow
def test_norms_held_by_single_heads_are_noticed():
    config = StableLmConfig(
        vocab_size=V, hidden_size=E, intermediate_size=I, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=H,
        qk_layernorm=True,
    )  # fmt: skip
    traced = follow_channels(StableLmForCausalLM(config))
    assert "layers.0.heads" not in traced.groups.named()
    assert traced.groups.named()["layers.1.ffn"].units == I
    assert any(refusal.kind == "heads" and "layernorm" in refusal.reason for refusal in traced.refusals)


class Block(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.norm = nn.RMSNorm(E)
        self.up, self.down = nn.Linear(E, I), nn.Linear(I, E)
        self.mix = mix

    def forward(self, x):
        return x + self.down(self.mix(self.up(self.norm(x)).relu()))


class Toy(nn.Module):
    """No transformers model, no attention: a stack of blocks between a table and a head."""

    def __init__(self, mix=lambda x: x, layers=2):
        super().__init__()
        self.config = SimpleNamespace(model_type="toy")
        self.table = nn.Embedding(V, E)
        self.blocks = nn.ModuleList(Block(mix) for _ in range(layers))
        self.head = nn.Linear(E, V, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_model_of_no_known_family():
    model = Toy()
    groups = trace(model)
    found = groups.named()
    assert [group.name for group in groups.groups if group.kind == "ffn"] == ["layers.0.ffn", "layers.1.ffn"]
    assert found["layers.1.ffn"].unit_parameters == 2 * E + 1
    assert found["residual"].unit_parameters == 2 * V + 2 * (2 * I + 1 + 1)
    assert (groups.family, groups.layers, groups.parameters) == ("toy", 2, parameter_count(model))


def interleaved(x):
    """Gate and up as even and odd channels, each folded onto one half and joined again."""
    half = x[..., ::2] * x[..., 1::2]
    return torch.cat((half, half), dim=-1)


def test_pairs_that_a_view_takes_apart_stay_together():
    group = trace(Toy(interleaved)).named()["layers.0.ffn"]
    assert group.units == I // 2
    up = next(m for m in group.members if m.parameter == "blocks.0.up.weight")
    assert (up.offset, up.size) == (0, 2)
    down = [(m.offset, m.size) for m in group.members if m.parameter == "blocks.0.down.weight"]
    assert down == [(0, 1), (I // 2, 1)]


MIXERS = {
    "cumsum": lambda x: x.cumsum(-1),
    "softmax": lambda x: x.softmax(-1),
    "fft": lambda x: torch.fft.fft(x).real,
    "sort": lambda x: x.sort(-1).values,
    "matmul": lambda x: x @ torch.ones(I, I),
}


@pytest.mark.parametrize("name", MIXERS)
def test_what_mixes_channels_is_refused_by_the_name_of_its_node(name):
    with pytest.raises(ModelError, match=name) as caught:
        trace(Toy(MIXERS[name]))
    assert "node '" in str(caught.value)
    assert "blocks.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_mixes_tokens_is_followed():
    assert trace(Toy(lambda x: x.cumsum(1))).named()["layers.0.ffn"].units == I


def test_a_gate_computed_from_all_channels_stands_in_the_way():
    traced = follow_channels(Toy(lambda x: x * x.mean(-1, keepdim=True)))
    assert "layers.0.ffn" not in traced.groups.named()
    assert any(refusal.kind == "ffn" and "one number" in refusal.reason for refusal in traced.refusals)


@pytest.mark.slow
def test_a_constant_that_differs_between_channels_stands_in_the_way():
    assert trace(Toy(lambda x: x * torch.full((I,), 0.5))).named()["layers.0.ffn"].units == I
    traced = follow_channels(Toy(lambda x: x * torch.arange(I)))
    assert any(refusal.kind == "ffn" and "constant" in refusal.reason for refusal in traced.refusals)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="no list of layers"):
        trace(nn.Sequential(nn.Embedding(V, E), nn.Linear(E, V)))


@pytest.mark.slow
def test_a_config_is_enough_and_weights_are_never_made():
    """A 7B shape with grouped heads: < 10 s of work and < 1 GB (issue: 32 layers on two cores)."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    before_kib, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    groups = trace(config)
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 1e6
    assert groups.parameters == 5_933_109_248
    assert {(g.kind, g.units) for g in groups.groups} == {
        ("heads", 8), ("query_heads", 4), ("ffn", 11008), ("attention", 1), ("mlp", 1), ("layer", 1), ("residual", 4096),
    }  # fmt: skip
    assert len(groups.of("ffn")) == 32


@pytest.mark.slow
def test_the_model_is_left_as_it_was(make_model):
    model = make_model("gpt2").train()
    config, state = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    trace(model)
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in model.parameters())
