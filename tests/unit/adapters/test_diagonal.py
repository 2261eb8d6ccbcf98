"""Diagonals around the leading columns of a weight, by their formula in float64, and folded into the second factor of a factored layer."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from regraft.adapters import ADAPTERS, Method, Spec
from regraft.models.uneven.factored_regraft import FactoredLinear
from regraft.models.view import ModelView, fingerprint, parameter_count
from regraft.numerics.truncation import truncation
from regraft.plans import Factoring, FactorPlan
from regraft.settings import RecoverSettings, Settings
from regraft.surgery.adapters import inject
from regraft.surgery.factorize import factorize


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_change_is_the_papers_formula() -> None:
    method = cast(Method, ADAPTERS.get("diagonal"))
    weight = draw(9, 6, seed=1)
    spec = Spec("expand", 9, 6, 4, 1.0, 0.0, 0, Settings())
    delta = method.make(spec, weight)
    x = draw(5, 6, seed=2).float()
    assert not delta.delta(x).any()
    assert sum(parameter.numel() for parameter in delta.parameters()) == method.count(spec) == 9 + 4
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(0.3 * draw(len(parameter), seed=len(parameter)))
    stored = delta.stored()
    around = torch.diag(1 + stored["outputs"].double()) @ weight[:, :4] @ torch.diag(1 + stored["components"].double())
    expected = torch.cat([around - weight[:, :4], torch.zeros(9, 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(delta.delta_weight().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(delta.delta(x).double(), x.double() @ expected.T, rtol=1e-5, atol=1e-5)
    again = method.restore(spec, stored, weight)
    assert torch.equal(again.delta_weight(), delta.delta_weight())


@pytest.mark.parametrize("layout", ["plain", "pifa"])
@pytest.mark.parametrize("adapter", ["diagonal", "lora"])
def test_it_folds_exactly_into_the_factors(make_model, layout: str, adapter: str) -> None:
    """In float64: the merged model computes what the adapted one does, with factors of the same shapes; the rest is as it was."""
    dense = make_model("llama")
    name = "model.layers.1.mlp.up_proj"
    weight = dense.get_parameter(f"{name}.weight").detach()
    plan = FactorPlan(fingerprint(dense), "svd", "t", layout, 0.1, 1, 1, (Factoring(name, 12, False),))
    model = factorize(dense, plan, {name: truncation(weight, None, None).at(12)}).double()
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(6))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count = parameter_count(model)
    injected = inject(model, RecoverSettings(adapter=adapter, rank=5, targets=("expand",)), None, 0)
    with torch.no_grad():
        for parameter in injected.module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * draw(*parameter.shape, seed=parameter.numel()))
        adapted = injected.module.eval()(input_ids=ids).logits
        merged = injected.adapter.merge(injected.module)
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-5, atol=1e-6)
    factored = ModelView(merged).factored()
    assert list(factored) == [name]
    assert isinstance(factored[name], FactoredLinear)
    assert factored[name].rank == 12
    assert parameter_count(merged) == count
    changed = [key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [f"{name}.expand.weight"]
    if adapter == "diagonal":
        assert torch.equal(merged.state_dict()[changed[0]][:, 5:], before[changed[0]][:, 5:])
