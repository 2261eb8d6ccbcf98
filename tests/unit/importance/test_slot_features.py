"""What is known of a layer before any recovery: gradient energy and explained variance, against dense formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from transformers import PreTrainedModel

from regraft.importance import gradient_energy as module
from regraft.importance.gradient_energy import gradient_energy
from regraft.importance.input_variance import explained_variance
from regraft.models.view import ModelView

RANKS = (1, 2, 4, 6)
Make = Callable[..., PreTrainedModel]


def windows(count: int = 6, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 97, (count, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dense_side", [512, 8])
def test_gradient_energy_is_that_of_the_mean_gradient(make_model: Make, monkeypatch: pytest.MonkeyPatch, dense_side: int) -> None:
    """By torch's own backward pass and a full decomposition; the sketched one has to agree."""
    monkeypatch.setattr(module, "_DENSE_SIDE", dense_side)
    model, ids = make_model("llama"), windows()
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    weights = {name: dict(model.named_parameters())[name] for name in names}
    found = gradient_energy(model, weights, ids, RANKS, torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    for name in names:
        gradient = weights[name].grad
        assert gradient is not None
        energy = np.cumsum(np.linalg.svd(gradient.double().numpy(), compute_uv=False) ** 2)
        assert found[name] == pytest.approx([energy[rank - 1] for rank in RANKS], rel=1e-4 if dense_side == 512 else 0.02)
    again = gradient_energy(model, weights, ids, (2, 900), torch.Generator())
    total = float(weights[names[0]].grad.double().square().sum())  # pyright: ignore[reportOptionalMemberAccess]
    assert again[names[0]][1] == pytest.approx(total, rel=1e-4)


def test_explained_variance_is_that_of_principal_components(make_model: Make) -> None:
    """In one batch, where the incremental decomposition is the plain one."""
    model, ids = make_model("llama"), windows(4, 16)
    modules = {name: each for name, each in ModelView(model).adapted_modules().items() if name.startswith("model.layers.1.")}
    inputs: dict[str, torch.Tensor] = {}
    for name, each in modules.items():
        each.register_forward_pre_hook(lambda _module, arguments, name=name: inputs.__setitem__(name, arguments[0].flatten(0, 1)))
    found = explained_variance(model, modules, ids, RANKS, batch=4)
    for name, values in inputs.items():
        ratios = np.cumsum(PCA().fit(values.double().numpy()).explained_variance_ratio_)
        assert found[name] == pytest.approx([ratios[rank - 1] for rank in RANKS], rel=1e-3)
    same = [found[f"model.layers.1.self_attn.{name}_proj"] for name in "qkv"]
    assert same[0] == same[1] == same[2]
    assert not any(each._forward_pre_hooks and len(each._forward_pre_hooks) > 1 for each in modules.values())


def test_explained_variance_over_several_batches_is_close_to_the_whole(make_model: Make) -> None:
    model, ids = make_model("llama"), windows(24, 16)
    name = "model.layers.0.mlp.down_proj"
    modules = {name: dict(model.named_modules())[name]}
    parts, whole = (explained_variance(model, modules, ids, RANKS, batch=batch)[name] for batch in (8, 24))
    assert parts == pytest.approx(whole, abs=0.03)
    assert list(parts) == sorted(parts)
