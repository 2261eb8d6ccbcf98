"""Float32 for a while, and every bit back afterwards."""

from __future__ import annotations

import pytest
import torch

from conftest import random_model
from regraft.importance.passes import mean_gradients
from regraft.models.precision import float32_on_cpu, round_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_come_back_bit_for_bit_after_an_error_too(dtype: torch.dtype) -> None:
    model = random_model("llama").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop_within() -> None:
        with float32_on_cpu(model):
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_within()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_gradients_of_narrow_weights_are_those_of_the_same_weights_in_float32() -> None:
    narrow = random_model("llama").to(torch.bfloat16)
    wide = random_model("llama").to(torch.bfloat16).float()
    wide.load_state_dict(narrow.state_dict())
    windows = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(0))
    found, _ = mean_gradients(narrow, dict(narrow.named_parameters()), windows, squares=False)
    for name, parameter in wide.named_parameters():
        wide.zero_grad()
        total = torch.zeros_like(parameter)
        for window in windows:
            loss = wide(input_ids=window[None], labels=window[None]).loss
            total += torch.autograd.grad(loss, parameter)[0] / len(windows)
        assert torch.allclose(found[name], total, rtol=1e-5, atol=1e-7), name


def test_rounding_gives_what_the_narrow_type_can_hold_and_leaves_stand_ins_alone():
    module = torch.nn.Linear(3, 2)
    wanted = module.weight.detach().to(torch.bfloat16)
    module.bias.data = torch.zeros(()).expand(2)
    round_weights(module, torch.bfloat16)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight.to(torch.bfloat16), wanted)
    assert torch.equal(module.weight, wanted.float())
    assert module.bias.stride() == (0,)
