"""LoRA-XS against NumPy's decomposition; a stored core is bound to its frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapter_toys import evidence, toy
from planted import plant
from regraft.adapters import AdapterRequest, make_specs
from regraft.adapters import lora_xs as module
from regraft.adapters.lora_xs import LoraXs, LoraXsDelta, LoraXsOptions, frames_of
from regraft.errors import InputError, ModelError
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject, load_adapter, save_adapter


def made(weight: Tensor, rank: int) -> LoraXsDelta:
    request = AdapterRequest({"w": rank}, {"w": 6.0}, 0.0, 1, LoraXsOptions())
    spec = make_specs({"w": nn.Linear(weight.shape[1], weight.shape[0])}, request)["w"]
    delta = LoraXs().make(spec, weight)
    assert isinstance(delta, LoraXsDelta)
    return delta


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_the_change_is_u_r_s_v(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    delta = made(weight, 4)
    with torch.no_grad():
        delta.core.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    u, s, vt = np.linalg.svd(weight.double().numpy())
    signs = np.sign(np.take_along_axis(u[:, :4], np.abs(u[:, :4]).argmax(0)[None], 0))
    dense = 6.0 / 4 * (u[:, :4] * signs) @ delta.core.detach().double().numpy() @ np.diag(s[:4]) @ (vt[:4] * signs.T)
    np.testing.assert_allclose(delta.delta_weight().detach().numpy(), dense, atol=1e-5)
    assert [name for name, _ in delta.named_parameters()] == ["core"]


def test_a_randomised_decomposition_of_large_weights_is_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = plant(60, 50, 6).float() + 1e-4 * torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    exact = frames_of(weight, 4)
    monkeypatch.setattr(module, "EXACT_UP_TO", 8)
    for found, wanted in zip(frames_of(weight, 4), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_turned_signs_are_seen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    injected = inject(toy(), RecoverSettings(adapter="lora_xs", rank=4), None, 3, evidence())
    save_adapter(injected, tmp_path, "base")
    load_adapter(toy(), tmp_path)  # the control: the same frames are taken

    def turned(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        left, right = frames_of(weight, rank)
        signs = torch.ones(rank, dtype=left.dtype)
        signs[1] = -1
        return left * signs, right * signs[:, None]

    monkeypatch.setattr(module, "frames_of", turned)
    with pytest.raises((InputError, ModelError), match=r"singular vectors of .* differ from those") as raised:
        load_adapter(toy(), tmp_path)
    assert "\n" not in str(raised.value)
