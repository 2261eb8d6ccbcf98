"""Re-fitted models against the definition: what a projection puts out on the calibration text, before and after."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from regraft.groups.discover import discover
from regraft.models.layerwise import Layerwise
from regraft.models.view import ModelView
from regraft.plans import Cut, PrunePlan, Scores
from regraft.surgery.cut import cut
from regraft.surgery.damage_curves import measure_curves
from regraft.surgery.refit_layerwise import compensate

WINDOWS = torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(5))
CUTS = (
    Cut("layers.0.ffn", tuple(range(0, 64, 2))),
    Cut("layers.1.heads", (0, 2)),
    Cut("layers.1.ffn", tuple(range(40))),
)


def plan_for(groups, cuts=CUTS):
    return PrunePlan(groups.fingerprint, "planted", "planted", "per-layer", 0.1, 1, groups.parameters, groups.parameters, cuts)


@torch.no_grad()
def divergence(dense, other, windows=WINDOWS):
    before, after = dense(windows).logits.log_softmax(-1), other(windows).logits.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral-window", "qwen3"])
def test_layer_by_layer_is_the_model(make_model, family):
    model = make_model(family)
    walk = Layerwise(ModelView(model), WINDOWS, batch=5)
    hidden = walk.first
    for layer in range(3):
        hidden = walk.run(layer, hidden)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(walk.logits(hidden))), model(WINDOWS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2"])
def test_refitting_brings_the_predictions_back(make_model, family):
    model = make_model(family)
    view = ModelView(model)
    groups = discover(view)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = cut(model, groups, plan_for(groups))
    refitted = cut(model, groups, plan_for(groups), compensate(view, groups, CUTS, WINDOWS, "least_squares"))
    assert divergence(model, refitted) < 0.9 * divergence(model, plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the dense model is left alone"


def test_redundant_channels_are_made_good_exactly(make_model):
    """Channel 2k+1 repeats channel 2k, so that the even ones alone can do the work; least squares has to find that."""
    model = make_model("llama")
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[1::2] = projection.weight[0::2]
    view = ModelView(model)
    groups = discover(view)
    cuts = CUTS[:1]
    refitted = cut(model, groups, plan_for(groups, cuts), compensate(view, groups, cuts, WINDOWS, "least_squares"))
    plain = cut(model, groups, plan_for(groups, cuts))
    fresh = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(9))
    assert divergence(model, refitted, fresh) < 1e-4 < divergence(model, plain, fresh)


def test_least_squares_matches_a_dense_solution(make_model):
    """The first cut of the first layer sees dense inputs, so that a dense solver on its activations must agree."""
    model = make_model("llama")
    view = ModelView(model)
    groups = discover(view)
    seen = []
    projection = model.model.layers[0].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    x = seen[0].reshape(-1, 64).double()
    kept = list(CUTS[0].kept)
    wanted = x @ projection.weight.double().T
    best = torch.linalg.lstsq(x[:, kept], wanted).solution
    best_error = (x[:, kept] @ best - wanted).square().sum()
    changed = compensate(view, groups, CUTS[:1], WINDOWS, "least_squares")["model.layers.0.mlp.down_proj.weight"]
    assert changed[:, 1::2].abs().max() == 0
    error = (x @ changed.double().T - wanted).square().sum()
    plain = (x[:, kept] @ projection.weight[:, kept].double().T - wanted).square().sum()
    assert best_error <= error * (1 + 1e-6)
    assert error < best_error + 0.4 * (plain - best_error), "damping, chosen on other windows, gives up a part"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "olmo2"])
def test_parts_that_did_not_change_are_not_run_again(make_model, monkeypatch, family):
    """Attention runs once, whatever comes after its projection; where that cannot be, the layer runs again."""
    model = make_model(family)
    view = ModelView(model)
    groups = discover(view)
    cuts = tuple(Cut(group.name, tuple(range(group.units // 2))) for group in groups.groups if group.kind in ("heads", "ffn"))
    calls = []
    attention = next(module for name, module in view.layers[1].named_modules() if name.endswith(("self_attn", "attn", "attention")))
    inner = next(module for module in attention.children() if sum(1 for _ in module.parameters()))
    handle = inner.register_forward_hook(lambda *_: calls.append(1))  # copied with the layer
    quick = compensate(view, groups, cuts, WINDOWS, "least_squares")
    once = len(calls)
    monkeypatch.setattr("regraft.models.layerwise.WholeWalk.roomy", False)
    slow = compensate(view, groups, cuts, WINDOWS, "least_squares")
    handle.remove()
    assert len(calls) - once > once or family == "bloom", "its attention adds the stream"
    for name, tensor in slow.items():
        torch.testing.assert_close(quick[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_mean_goes_into_the_bias_where_there_is_one(make_model):
    model = make_model("llama-bias")
    view = ModelView(model)
    changed = compensate(view, discover(view), CUTS[:1], WINDOWS, "mean")
    seen = []
    projection = model.model.layers[0].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    mean = seen[0].reshape(-1, 64).double().mean(0)
    weight = projection.weight.detach().double()
    want = projection.bias.detach().double() + weight[:, 1::2] @ mean[1::2]
    torch.testing.assert_close(changed["model.layers.0.mlp.down_proj.bias"].double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed["model.layers.0.mlp.down_proj.weight"][:, ::2], projection.weight[:, ::2].detach())


def test_curves_are_the_divergence_of_the_cut_model(make_model):
    model = make_model("llama")
    view = ModelView(model)
    groups = discover(view)
    scores = Scores(groups.fingerprint, "planted", {g.name: tuple(float(u) for u in range(g.units)) for g in groups.groups})
    curves = measure_curves(view, groups, scores, WINDOWS, only=["layers.1.heads", "layers.2.ffn"])
    assert sorted(curves.values) == ["layers.1.heads", "layers.2.ffn"]
    curve = curves.values["layers.2.ffn"]
    assert curve.kept[-1] == 64
    assert curve.damage_nats[-1] == 0.0
    assert curve.cost[-1] == 64 * groups.named()["layers.2.ffn"].unit_parameters
    size = curve.kept[3]
    cuts = (Cut("layers.2.ffn", tuple(range(64 - size, 64))),)
    refitted = cut(model, groups, plan_for(groups, cuts), compensate(view, groups, cuts, WINDOWS[:12], "least_squares"))
    assert curve.damage_nats[3] == pytest.approx(divergence(model, refitted, WINDOWS[12:]), rel=0.25)
    assert curve.damage_nats[0] > curve.damage_nats[-2]


@pytest.mark.slow
def test_milliseconds_are_measured_once_for_matrices_of_one_shape(make_model):
    model = make_model("llama")
    view = ModelView(model)
    groups = discover(view, ("heads", "ffn", "layer"))
    scores = Scores(groups.fingerprint, "planted", {g.name: tuple(float(u) for u in range(g.units)) for g in groups.groups})
    curves = measure_curves(view, groups, scores, WINDOWS[:8], only=[g.name for g in groups.groups], unit="milliseconds").values
    assert curves["layers.0.ffn"].cost == curves["layers.2.ffn"].cost
    assert curves["layers.0.heads"].cost == curves["layers.1.heads"].cost != curves["layers.0.ffn"].cost
    for curve in curves.values():
        assert all(first <= second for first, second in pairwise(curve.cost))
        assert 0.0 < curve.cost[-1] < 1000.0
