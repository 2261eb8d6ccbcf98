"""Every criterion against a dense formula in float64 that shares no code with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regraft.errors import InputError
from regraft.groups.declared import discover
from regraft.importance import CRITERIA, Evidence, score
from regraft.importance.criteria import EVERYTHING, WIDTHS
from regraft.models.view import ModelView

WINDOWS = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(5))


def evidence(model, **options):
    return Evidence(model=model, groups=discover(ModelView(model)), windows=WINDOWS, seed=11, **options)


def dense_gradients(model):
    """Mean gradient and mean squared gradient over windows, from a loss written out by hand."""
    first, second = {}, {}
    for window in WINDOWS:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1].double()
        loss = -torch.log_softmax(logits, dim=-1)[torch.arange(len(window) - 1), window[1:]].mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            first[name] = first.get(name, 0) + parameter.grad.double() / len(WINDOWS)
            second[name] = second.get(name, 0) + parameter.grad.double() ** 2 / len(WINDOWS)
    model.zero_grad(set_to_none=True)
    return first, second


def unit_slices(model, layer, kind, unit):
    """(parameter, index) of everything that goes with one unit, written out for Llama."""
    prefix = f"model.layers.{layer}."
    if kind == "ffn":
        rows = [[(prefix + module, (unit,))] for module in ("mlp.gate_proj", "mlp.up_proj")]
        return [*rows, [(prefix + "mlp.down_proj", (slice(None), unit))]]
    width = model.config.head_dim
    repeats = model.config.num_attention_heads // model.config.num_key_value_heads
    query = range(unit * repeats * width, (unit + 1) * repeats * width)
    head = range(unit * width, (unit + 1) * width)
    return [
        [(prefix + "self_attn.q_proj", (row,)) for row in query],
        [(prefix + "self_attn.k_proj", (row,)) for row in head],
        [(prefix + "self_attn.v_proj", (row,)) for row in head],
        [(prefix + "self_attn.o_proj", (slice(None), column)) for column in query],
    ]


def dense_score(model, saliency, layer, kind, unit, granularity, how):
    members = []
    for vectors in unit_slices(model, layer, kind, unit):
        total = 0.0
        for module, index in vectors:
            values = saliency[module + ".weight"][index].flatten()
            bias = saliency.get(module + ".bias")
            if bias is not None and len(index) == 1:
                values = torch.cat([values, bias[index].flatten()])
            total += float(values.abs().sum() if granularity == "element" else values.sum().abs())
        members.append(total)
    members = torch.tensor(members, dtype=torch.float64)
    return {"sum": members.sum, "mean": members.mean, "max": members.max, "product": members.prod, "last": lambda: members[-1]}[how]()


def assert_matches(model, got, saliency, granularity, how):
    for group in discover(ModelView(model)).groups:
        want = [dense_score(model, saliency, group.layer, group.kind, unit, granularity, how) for unit in range(group.units)]
        torch.testing.assert_close(torch.tensor(got.values[group.name], dtype=torch.float64), torch.stack(want), rtol=1e-4, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-bias"])
@pytest.mark.parametrize("granularity", ["element", "vector"])
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_taylor_matches_a_dense_formula(make_model, family, order, granularity):
    model = make_model(family)
    first, second = dense_gradients(model)
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    saliency = {
        name: {
            "first": weight * first[name],
            "second": weight**2 * second[name],
            "mixed": weight * first[name] - 0.5 * weight**2 * second[name],
        }[order]
        for name, weight in weights.items()
    }
    got = score("taylor", evidence(model, order=order, granularity=granularity))
    assert_matches(model, got, saliency, granularity, "sum")


@pytest.mark.parametrize("how", ["sum", "mean", "max", "product", "last"])
@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_matches_a_dense_formula(make_model, criterion, power, how):
    model = make_model("llama-bias")
    saliency = {name: parameter.detach().double().abs() ** power for name, parameter in model.named_parameters()}
    assert_matches(model, score(criterion, evidence(model, reduce=how)), saliency, "element", how)


def test_orders_differ_and_second_order_is_not_negligible(make_model):
    model = make_model("llama")
    scores = [score("taylor", evidence(model, order=order)) for order in ("first", "second", "mixed")]
    first, second, mixed = (found.values["layers.0.ffn"] for found in scores)
    assert max(abs(a - b) for a, b in zip(first, mixed, strict=True)) > 1e-3 * max(first)
    assert max(second) > 1e-3 * max(first)


def test_random_is_fixed_by_the_seed_and_leaves_the_global_generator_alone(make_model):
    model = make_model("llama")
    state = torch.random.get_rng_state()
    first, again = score("random", evidence(model)), score("random", evidence(model))
    other = score("random", Evidence(model, discover(ModelView(model)), None, seed=12))
    assert first == again
    assert first.values != other.values
    assert torch.equal(state, torch.random.get_rng_state())


def test_scoring_leaves_the_model_as_it_was(make_model):
    model = make_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score("taylor", evidence(model))
    assert model.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_criterion_is_named_with_a_suggestion(make_model):
    with pytest.raises(InputError, match=r"unknown criterion 'tailor'.*did you mean 'taylor'"):
        score("tailor", evidence(make_model("llama")))


def test_text_is_asked_for_where_it_is_needed(make_model):
    model = make_model("llama")
    with pytest.raises(InputError, match="needs calibration text"):
        score("taylor", Evidence(model, discover(ModelView(model)), None, seed=0))


def test_a_planted_important_kv_head_survives(make_model):
    """Under GQA the query heads of a KV group are adjacent rows; a strided view would credit the wrong group."""
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    width, repeats = 8, 2
    with torch.no_grad():  # all heads mute but the query heads of KV group 1
        mute = torch.ones(48)
        mute[1 * repeats * width : 2 * repeats * width] = 0.0
        attention.o_proj.weight.mul_(1.0 - mute)
        attention.q_proj.weight.mul_((1.0 - mute)[:, None])
    for criterion in ("taylor", "l1", "l2"):
        values = score(criterion, evidence(model)).values["layers.1.heads"]
        assert values.index(max(values)) == 1, criterion


CHANGED = {"seed": 12, "order": "mixed", "granularity": "vector", "reduce": "max", "consecutive": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CRITERIA if set(WIDTHS) & set(CRITERIA.get(name).scores)])
def test_a_criterion_reads_what_it_declares_and_nothing_else(make_model, name: str) -> None:
    """Cached scores are found by what a criterion declares: a field that it reads in secret would be a wrong hit."""
    model, criterion = make_model("llama"), CRITERIA.get(name)
    before = criterion.units(evidence(model))
    assert set(CHANGED) == EVERYTHING
    for field, value in CHANGED.items():
        after = criterion.units(replace(evidence(model), **{field: value}))
        same = all(torch.equal(before[group], after[group]) for group in before)
        assert same == (field not in criterion.reads), field


def test_a_criterion_sees_the_defaults_of_what_it_does_not_declare(make_model) -> None:
    """Even one that declares too little cannot give other scores for the same key."""
    model = make_model("llama")
    sly = replace(CRITERIA.get("random"), reads=frozenset())
    given = [replace(evidence(model), seed=seed) for seed in (11, 12)]
    first, second = (sly.units(sly.seen(one)) for one in given)
    assert sly.key(given[0]) == sly.key(given[1])
    assert all(torch.equal(first[group], second[group]) for group in first)
