"""NOLA against dense float64 mixtures: the start, the first step, chunks, what is saved, and memory."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fresh
from adapter_toys import evidence, scramble, toy
from regraft.adapters import AdapterRequest, make_specs, nola
from regraft.adapters.nola import BLOCK, Nola, NolaDelta, NolaOptions, dequantised, quantised
from regraft.errors import InputError
from regraft.numerics.counter import MOST, random_uniform
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject, save_adapter


def made(rows: int = 14, columns: int = 10, rank: int = 3, **options: Any) -> NolaDelta:
    request = AdapterRequest({"w": rank}, {"w": 6.0}, 0.0, 1, NolaOptions(**options))
    spec = make_specs({"w": nn.Linear(columns, rows)}, request)["w"]
    delta = Nola().make(spec, torch.zeros(rows, columns))
    assert isinstance(delta, NolaDelta)
    return delta


def dense(delta: NolaDelta) -> Tensor:
    """alpha/r (1/sqrt(k) sum b_j B_j) (A_0 + 1/sqrt(k) sum a_i A_i) from whole bases, float64."""
    spec, k = delta.spec, len(delta.a)

    def bases(part: str, rows: int, columns: int) -> Tensor:
        numbers = random_uniform(delta._keys[part], 0, rows * columns * k).double()
        return numbers.view(rows, columns, k).permute(2, 0, 1)

    start = random_uniform(delta._keys["start"], 0, spec.rank * spec.columns).double().view(spec.rank, spec.columns) / math.sqrt(
        spec.columns
    )
    a, b = (values.detach().double() for values in (delta.a, delta.b))
    right = start + torch.einsum("k,krc->rc", a, bases("A", spec.rank, spec.columns)) / math.sqrt(k)
    left = torch.einsum("k,krc->rc", b, bases("B", spec.rows, spec.rank)) / math.sqrt(k)
    return spec.alpha / spec.rank * left @ right


def test_the_change_is_the_dense_mixture() -> None:
    delta = made(bases=7)
    scramble_delta(delta)
    torch.testing.assert_close(delta.delta_weight().detach().double(), dense(delta), rtol=0, atol=1e-6)
    assert float(dense(delta).abs().max()) > 0.05


def scramble_delta(delta: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_at_the_first_step_only_b_learns() -> None:
    delta = made(bases=7)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    assert float(delta(x).detach().abs().max()) == 0.0
    delta(x).square().sum().backward()  # zero output, zero gradient: the control for the next
    assert delta.b.grad is not None
    assert float(delta.b.grad.abs().max()) == 0.0
    delta.zero_grad()
    (delta(x) * x.sum()).sum().backward()
    assert delta.a.grad is not None
    assert delta.b.grad is not None
    assert float(delta.a.grad.abs().max()) == 0.0
    assert float(delta.b.grad.abs().min()) > 0.0


def test_gradients_are_those_of_the_dense_formula() -> None:
    delta = made(bases=7)
    scramble_delta(delta)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    delta(x).square().sum().backward()
    step = 1e-5
    for parameter in (delta.a, delta.b):
        assert parameter.grad is not None
        for index in range(0, 7, 3):
            losses: list[float] = []
            for sign in (1, -1):
                other = made(bases=7)
                other.double()
                with torch.no_grad():
                    other.a.copy_(delta.a), other.b.copy_(delta.b)
                    (other.a if parameter is delta.a else other.b)[index] += sign * step
                losses.append(float((x.double() @ dense(other).T).square().sum()))
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert parameter.grad[index].item() == pytest.approx(numeric, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 13, 10**9])
def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    delta = made(bases=7)
    scramble_delta(delta)
    whole = delta.delta_weight().detach()
    monkeypatch.setattr(nola, "CPU_CHUNK", chunk)
    torch.testing.assert_close(delta.delta_weight().detach(), whole, rtol=0, atol=1e-6)


def test_never_more_than_a_chunk_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(key: int, start: int, count: int, device: Any = "cpu") -> Tensor:
        asked.append(count)
        return random_uniform(key, start, count, device)

    monkeypatch.setattr(nola, "random_uniform", counted)
    monkeypatch.setattr(nola, "CPU_CHUNK", 256)
    delta = made(rows=60, columns=50, bases=16)
    (delta(torch.ones(2, 50)).sum()).backward()
    assert max(asked) <= max(256, 3 * 50)  # A_0 itself is of rank times columns
    assert sum(asked) > 2 * 16 * 3 * 110  # forward and backward draw all of them


def test_a_fresh_process_makes_the_same_change_from_2k_numbers_and_a_seed(tmp_path: Any) -> None:
    injected = inject(toy(), RecoverSettings(adapter="nola", rank=4, adapter_options=("bases=16",)), None, 3, evidence())
    scramble(injected)
    save_adapter(injected, tmp_path, "base")
    modules = len(injected.adapter.factors(injected.module))
    assert (tmp_path / "adapter.safetensors").stat().st_size < modules * 2 * 16 * 4 + modules * 300
    script = """
import sys; from pathlib import Path
import torch
from adapter_toys import logits, toy
from regraft.surgery.adapters import load_adapter
torch.save(logits(load_adapter(toy(), Path(sys.argv[1])).module), sys.argv[1] + "/logits.pt")
"""
    tests = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    assert fresh.run(["-c", script, str(tmp_path)], env=environment).returncode == 0
    with torch.no_grad():
        here = injected.module.eval()(input_ids=torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), here)


def test_four_bits_keep_the_largest_and_are_stable() -> None:
    values = torch.randn(3 * BLOCK + 5, generator=torch.Generator().manual_seed(1))
    codes, scales = quantised(values)
    assert codes.dtype == torch.uint8
    assert len(codes) == 4 * BLOCK // 2
    once = dequantised(codes, scales, len(values))
    blocks = torch.nn.functional.pad(values, (0, BLOCK - 5)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    errors = torch.nn.functional.pad((once - values).abs(), (0, BLOCK - 5)).view(-1, BLOCK).amax(1)
    assert bool((errors <= largest / 8 * 1.0001).all())  # half a step, or a whole one at the end that has no 8
    assert torch.equal(dequantised(*quantised(once), len(values)), once)
    assert torch.equal(dequantised(*quantised(torch.zeros(9)), 9), torch.zeros(9))


def test_more_numbers_than_a_key_has_are_refused() -> None:
    request = AdapterRequest({"w": 512}, {"w": 6.0}, 0.0, 1, NolaOptions(bases=65536))
    spec = make_specs({"w": nn.Linear(512, 512)}, request)["w"]
    with pytest.raises(InputError, match=r"65536 bases of rank 512 for 'w' are too many numbers; use at most 8191"):
        Nola().check(spec)
    assert MOST == 2**31 - 1
