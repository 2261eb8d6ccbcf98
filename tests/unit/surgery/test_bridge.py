"""The bridge over removed layers against a dense ridge regression in float64, on other families, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from regraft import prune
from regraft.errors import InputError
from regraft.groups.discover import discover
from regraft.models.view import ModelView
from regraft.plans import Cut, PrunePlan
from regraft.settings import PruneSettings
from regraft.surgery.bridge import DAMPINGS, bridge, gaps_between
from regraft.surgery.cut import cut

Make = Callable[..., PreTrainedModel]


def windows(count: int = 24, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(seed))


def louder(model: PreTrainedModel) -> PreTrainedModel:
    """A random model whose layers do something: their weights are larger than at initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.eval()


def without(model: PreTrainedModel, gone: set[int]) -> tuple[PreTrainedModel, list[int]]:
    groups = discover(ModelView(model), ("layer",))
    cuts = tuple(Cut(f"layers.{layer}.layer", ()) for layer in sorted(gone))
    plan = PrunePlan(groups.fingerprint, "x", "x", "uniform", 0.0, 1, groups.parameters, groups.parameters, cuts)
    return cut(model, groups, plan), [layer for layer in range(groups.layers) if layer not in gone]


def divergence(one: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        first, second = (functional.log_softmax(model(input_ids=ids).logits.double(), -1) for model in (one, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_gaps() -> None:
    assert [(gap.below, gap.above) for gap in gaps_between(6, [0, 3, 4])] == [(0, 2), (2, 5)]
    assert gaps_between(4, [0, 1, 2, 3]) == ()
    assert gaps_between(4, [2, 3]) == (), "nothing lies below the first layer that stays"


@pytest.mark.slow
def test_the_weights_are_those_of_a_dense_ridge_regression(make_model: Make) -> None:
    dense = louder(make_model("llama"))
    short, kept = without(dense, {1})
    ids = windows(8)
    name = "model.layers.0.mlp.down_proj"
    old = short.get_submodule(name).weight.detach().double().clone()
    before = {key: value.clone() for key, value in dense.state_dict().items()}

    inputs: list[torch.Tensor] = []
    handle = short.get_submodule(name).register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    with torch.no_grad():
        goal = dense(input_ids=ids, output_hidden_states=True).hidden_states[2]
        stream = short(input_ids=ids, output_hidden_states=True).hidden_states[1]
    handle.remove()
    h = inputs[0][:, 1:].double()
    z = (goal - stream)[:, 1:].double() + h @ old.T

    def fitted(rows: slice, damping: float) -> torch.Tensor:
        x, y = h[rows].flatten(0, 1), z[rows].flatten(0, 1)
        ridge = damping * x.square().sum(0).mean()
        return old + torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ (y - x @ old.T)).T

    def error(weights: torch.Tensor) -> float:
        return float((z[7:] - h[7:] @ weights.T).square().sum())

    best = min(DAMPINGS, key=lambda damping: error(fitted(slice(0, 7), damping)))
    assert error(fitted(slice(0, 7), best)) < error(old)
    assert bridge(ModelView(dense), ModelView(short), kept, ids) == 1
    new = short.get_submodule(name).weight.detach().double()
    torch.testing.assert_close(new, fitted(slice(0, 8), best), rtol=1e-4, atol=1e-5)
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the dense model was changed"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_it_comes_nearer_to_the_dense_model_on_other_text(family: str, make_model: Make) -> None:
    dense = louder(make_model(family))
    short, kept = without(dense, {1})
    plain, _ = without(dense, {1})
    assert bridge(ModelView(dense), ModelView(short), kept, windows(48)) == 1
    other = windows(16, seed=7)
    assert divergence(dense, short, other) < divergence(dense, plain, other)


@pytest.mark.slow
def test_a_gap_that_cannot_be_bridged_is_left(make_model: Make) -> None:
    dense = louder(make_model("llama"))
    short, kept = without(dense, {0})
    assert bridge(ModelView(dense), ModelView(short), kept, windows()) == 0
    with torch.no_grad():  # a layer that does nothing leaves nothing to bridge
        for parameter in dense.model.layers[1].parameters():
            parameter.zero_()
    short, kept = without(dense, {1})
    old = short.model.layers[0].mlp.down_proj.weight.clone()
    bridge(ModelView(dense), ModelView(short), kept, windows())
    torch.testing.assert_close(short.model.layers[0].mlp.down_proj.weight, old, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_norm_after_the_feed_forward_part_is_refused(make_model: Make) -> None:
    dense = louder(make_model("gemma2"))
    short, kept = without(dense, {1})
    with pytest.raises(InputError, match="passes the feed-forward output through a norm"):
        bridge(ModelView(dense), ModelView(short), kept, windows())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bridge": True}, "`bridge` is for gaps"),
        ({"bridge": True, "targets": ("layers", "residual")}, "`targets=residual`"),
        ({"bridge": True, "targets": ("layers",), "memory": "4GB"}, "`memory`"),
    ],
)
def test_contradictions(settings: dict[str, object], said: str, make_model: Make) -> None:
    with pytest.raises(InputError, match=said):
        prune(make_model("llama"), settings=PruneSettings.model_validate(settings))
