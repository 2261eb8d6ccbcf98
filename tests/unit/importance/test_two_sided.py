"""Moments on both sides against the Fisher information by its definition, and scores in nats against measured damage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional
from transformers import PreTrainedModel

from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.importance import Evidence, score
from regraft.importance.passes import Passes
from regraft.importance.reader_moments import reader_moments
from regraft.models.view import ModelView
from regraft.plans import Curves
from regraft.selection import Budget, select
from regraft.surgery import damage_curves
from regraft.surgery.damage_curves import measure_curves, predict_curves, rescale_curves

WINDOWS = torch.randint(3, 96, (24, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_outputs_are_the_fisher_information_by_its_definition(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = make_model(family)
    view = ModelView(model)
    last = len(view.layers) - 1
    axis = next(axis for coupling in view.family.couplings if coupling.kind == "ffn" for axis in coupling.axes if axis.side == "in")
    name = f"{view.layer_name(last)}.{axis.module}"
    window = WINDOWS[:1, :2]
    seen = reader_moments(model, [name], window.repeat(24_000, 1), seed=0)[name]
    hidden: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    with torch.no_grad():
        model(input_ids=window)
    handle.remove()

    def log_probabilities(outputs: torch.Tensor) -> torch.Tensor:
        handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: outputs.reshape(output.shape))
        try:
            return functional.log_softmax(model(input_ids=window).logits, dim=-1)[0]
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(log_probabilities, hidden[0].reshape(2, -1)).double()  # (T, V, T, O)
    chances = log_probabilities(hidden[0]).detach().exp().double()
    exact = sum(torch.einsum("v,vi,vj->ij", chances[t], jacobian[t, :, t], jacobian[t, :, t]) for t in range(2)) / 2
    assert (seen.inputs.count, seen.outputs.count) == (48_000, 12_000)
    assert float((seen.outputs.second_DD - exact).norm() / exact.norm()) < 0.1
    assert float((2.0 * seen.outputs.second_DD - exact).norm() / exact.norm()) > 0.5


def test_inputs_are_plain_second_moments_and_nothing_is_left_behind(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    name = "model.layers.1.mlp.down_proj"
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    handle.remove()
    flat = rows[0].flatten(0, 1).double()
    seen = reader_moments(model, [name], WINDOWS, seed=0)[name]
    torch.testing.assert_close(seen.inputs.second_DD, flat.T @ flat / len(flat), rtol=1e-5, atol=1e-7)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_submodule(name)._forward_hooks


@pytest.mark.slow
def test_scores_in_nats_predict_measured_damage_and_measurements_put_them_right(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama-bias", tie_word_embeddings=True, num_hidden_layers=3)
    view, groups = ModelView(model), discover(ModelView(model), ("heads", "ffn"))
    scores = score("surgeon_nats", Evidence(model, groups, WINDOWS, 0))
    names = [group.name for group in groups.groups]
    predicted = predict_curves(view, groups, scores, WINDOWS, only=names)
    measured = measure_curves(view, groups, scores, WINDOWS, only=names)
    for group in groups.of("ffn"):
        here, truth = predicted.values[group.name], measured.values[group.name]
        at = [here.damage_nats[here.kept.index(size)] for size in truth.kept]
        assert spearmanr(at, truth.damage_nats)[0] > 0.95
    assert predicted.fixed_cost == measured.fixed_cost
    inputs = {name: seen.inputs for name, seen in reader_moments(model, _readers(view), WINDOWS, 0).items()}
    half = {group.name: group.units // 2 for group in groups.groups}
    judged = WINDOWS[-6:]  # the windows that measure_curves judges by
    right = rescale_curves(view, groups, scores, judged, predicted, half, inputs)
    for name in names:
        truth, curve = measured.values[name], right.values[name]
        size = half[name]
        if size in truth.kept and size in curve.kept:
            assert curve.damage_nats[curve.kept.index(size)] == pytest.approx(truth.damage_nats[truth.kept.index(size)], rel=0.3)
    monkeypatch.setattr(damage_curves, "MEASURED_LAYERS", 2)
    fewer = rescale_curves(view, groups, scores, judged, predicted, half, inputs)
    whole = [{group.layer: _factor(curves, predicted, group.name) for group in groups.of("ffn")} for curves in (right, fewer)]
    last = groups.layers - 1
    assert last == 2, "one layer lies between"
    assert whole[1] == pytest.approx({0: whole[0][0], 1: (whole[0][0] + whole[0][2]) / 2, 2: whole[0][2]}, rel=1e-6)
    budget = Budget(0.1, "per-layer", tuple(range(groups.layers)), ("heads", "ffn"), 1, right)
    assert select("knapsack", groups, scores, budget).achieved == pytest.approx(0.1, abs=0.01)


def test_a_model_that_is_not_in_memory_is_refused(make_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(InputError, match="`criterion=surgeon`"):
        Passes.reader_moments(None, (), 0)  # type: ignore[arg-type]
    model = make_model()
    groups = discover(ModelView(model), ("ffn",))
    with pytest.raises(InputError, match="`seq_len`"):
        score("surgeon_nats", Evidence(model, groups, WINDOWS[:, :1], 0))


def _factor(curves: Curves, predicted: Curves, name: str) -> float:
    return curves.values[name].damage_nats[0] / predicted.values[name].damage_nats[0]


def _readers(view: ModelView) -> list[str]:
    names = ("self_attn.o_proj", "mlp.down_proj")
    return [f"{view.layer_name(layer)}.{name}" for layer in range(len(view.layers)) for name in names]
