"""What is gathered in one pass against what each layer was really given, and gradients against autograd by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regraft.compression.gather import gather, grouped_batches
from regraft.errors import InputError
from regraft.models.view import ModelView
from regraft.numerics.moments import Moments

WINDOWS = torch.randint(3, 97, (40, 12), generator=torch.Generator().manual_seed(5))


def rows_into(model, names, windows) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: found[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_moments_are_of_the_inputs(make_model, family: str) -> None:
    model = make_model(family)
    view = ModelView(model)
    names = [f"{view.layer_name(layer)}.{name}" for layer in range(3) for name in view.linear_names()]
    projections = {name: model.get_submodule(name) for name in names}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {one.name: one for one in gather(model, projections, WINDOWS, "inputs", transposed=view.family.transposed)}
    assert list(found) == names
    for name, rows in rows_into(model, names, WINDOWS).items():
        seen = found[name].inputs
        assert seen is not None
        assert found[name].gradients is None
        assert found[name].weight_OI.shape[1] == rows.shape[1]
        torch.testing.assert_close(seen.second_DD, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_layers_that_read_the_same_share_their_moments(make_model) -> None:
    model = make_model("llama")
    prefix = "model.layers.1"
    names = [f"{prefix}.self_attn.{part}_proj" for part in "qkvo"] + [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up", "down")]
    found = [one.inputs for one in gather(model, {name: model.get_submodule(name) for name in names}, WINDOWS, "inputs")]
    assert found[0] is found[1] is found[2]
    assert found[4] is found[5]
    assert len({id(one) for one in found}) == 4


@pytest.mark.long
def test_gradients_have_the_fisher_moment(make_model) -> None:
    """In expectation over the draws E[g g'] is the Fisher information, here by summing over the whole vocabulary at the last position."""
    model = make_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)
    name = "model.layers.2.mlp.down_proj"  # what it writes at one position moves the prediction there alone
    windows = WINDOWS[:8, :4]
    drawn = Moments.empty(48)
    for seed in range(150):
        (one,) = gather(model, {name: model.get_submodule(name)}, windows, "gradients", seed=seed)
        assert one.gradients is not None
        drawn = drawn + one.gradients
    exact = torch.zeros(48, 48, dtype=torch.float64)
    outputs: list[Tensor] = []

    def keep(_module, _inputs, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = model.get_submodule(name).register_forward_hook(keep)
    likely = model(input_ids=windows).logits.log_softmax(-1)
    handle.remove()
    for token in range(97):
        (gradient,) = torch.autograd.grad(likely[..., token].sum(), outputs, retain_graph=True)
        weights = likely[..., token].exp().detach().reshape(-1, 1).double()
        rows = gradient.reshape(-1, 48).double()
        exact += (rows * weights).T @ rows / len(rows)
    assert float((drawn.second_DD - exact).norm() / exact.norm()) < 0.1


@pytest.mark.slow
def test_several_passes_find_the_same(make_model) -> None:
    model = make_model("llama")
    view = ModelView(model)
    projections = dict(view.adapted_modules())
    whole = list(gather(model, projections, WINDOWS, "gradients"))
    parts = list(gather(model, projections, WINDOWS, "gradients", most_bytes=200_000))
    for one, other in zip(whole, parts, strict=True):
        assert one.name == other.name
        assert one.inputs is not None
        assert other.inputs is not None
        assert one.gradients is not None
        assert other.gradients is not None
        torch.testing.assert_close(one.inputs.covariance_DD, other.inputs.covariance_DD)
        torch.testing.assert_close(one.gradients.second_DD, other.gradients.second_DD, rtol=1e-5, atol=1e-9)


def test_groups_are_32_and_no_batch_crosses_them() -> None:
    windows = torch.arange(70).unsqueeze(1)
    found = grouped_batches(windows)
    assert {group for group, _ in found} == set(range(32))
    assert torch.equal(torch.cat([batch for _, batch in found]), windows)
    assert [group for group, _ in grouped_batches(windows[:3])] == [0, 1, 2]


def test_a_layer_that_overflows_is_named_with_its_batch(make_model) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.inf
    windows = torch.full((32, 4), 7)
    windows[20] = 50
    with pytest.raises(InputError, match=r"'model.layers.0.self_attn.q_proj' hold NaN or infinity in batch 21 of"):
        list(gather(model, dict(ModelView(model).adapted_modules()), windows, "inputs"))
