"""Deep LoRA against dense float64 formulas: the frames, the start, the rates, trimming, the export."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from adapter_toys import FORMS, batch, evidence, logits, scramble, toy
from planted import plant
from regraft.adapters import ADAPTERS, AdapterRequest, Evidence, make_specs
from regraft.adapters.deep_lora import CompressedDelta, DeepLora, DeepLoraOptions, scaled_rate
from regraft.errors import ConfigError, InputError
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import inject, merge
from regraft.surgery.first_gradients import first_gradients
from regraft.surgery.per_module import PerModule


def made(shape: tuple[int, int], rank: int, **options: Any) -> CompressedDelta:
    request = AdapterRequest({"w": rank}, {"w": float(rank)}, 0.0, 1, DeepLoraOptions(**options))
    spec = make_specs({"w": nn.Linear(shape[1], shape[0])}, request)["w"]
    delta = DeepLora().make(spec, plant(*shape, 2).float())
    assert isinstance(delta, CompressedDelta)
    return delta


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_the_start_is_eps_cubed_between_frames_of_the_gradient(shape: tuple[int, int]) -> None:
    delta = made(shape, 4, epsilon=0.1, gamma=0.0).requires_grad_(False)
    left, right = delta.left.double(), delta.right.double()
    for frame in (left, right):
        torch.testing.assert_close(frame.T @ frame, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    spectral = torch.linalg.matrix_norm(delta.delta_weight().double(), ord=2)
    assert float(spectral) == pytest.approx(1e-3, rel=1e-5)
    u, _, vh = torch.linalg.svd(plant(*shape, 2))  # the gradient's own directions, decomposed whole
    assert float((u[:, :2] - left @ (left.T @ u[:, :2])).abs().max()) <= 1e-5
    assert float((vh[:2].T - right @ (right.T @ vh[:2].T)).abs().max()) <= 1e-5
    # The change reads the gradient's right vectors into directions other than its left ones, and the other way round.
    assert float((u[:, :2].T @ delta.delta_weight().double() @ vh[:2].T).abs().max()) <= 1e-8


def test_the_first_gradient_is_that_of_autograd_in_parts_of_any_size() -> None:
    model = toy()
    modules = {name: model.get_submodule(name) for name in ("embed_tokens", "layers.0.up_proj", "layers.0.c_proj")}
    model.train()
    expected = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    for seed in range(3):
        model.zero_grad()
        model(**batch(seed=seed)).loss.backward()
        for name, module in modules.items():
            expected[name] += module.weight.grad / 3
    model.zero_grad()
    for at_once in (1, 10**9):
        found = dict(first_gradients(model, modules, evidence(), 3, at_once))
        assert list(found) == list(modules)
        torch.testing.assert_close(found["layers.0.up_proj"], expected["layers.0.up_proj"], rtol=1e-4, atol=1e-7)
        for name in ("embed_tokens", "layers.0.c_proj"):
            torch.testing.assert_close(found[name], expected[name].T, rtol=1e-4, atol=1e-7)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_tied_embedding_shows_the_gradient_of_its_lookups_alone() -> None:
    model = toy()
    model.layers[0].c_proj.weight = nn.Parameter(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)))
    model.layers[0].c_proj.bias, model.layers[0].c_proj.nf = nn.Parameter(torch.zeros(24)), 24
    model.lm_head.weight = model.embed_tokens.weight
    rows = {"embed_tokens": model.embed_tokens}
    # The last token of the vocabulary is predicted but never read.
    ids = batch()["input_ids"] % 39
    tied = Evidence(lambda count: [{"input_ids": ids, "labels": torch.full_like(ids, 39)}])
    gradient = dict(first_gradients(model, rows, tied, 1))["embed_tokens"]
    assert float(gradient[:, 39].abs().max()) == 0.0
    assert float(gradient[:, int(ids[0, 0])].abs().max()) > 0.0


@pytest.mark.parametrize(("gamma", "trained"), [(0.01, 3 * 16 + 4 * (24 + 32)), (0.0, 3 * 16)])
def test_the_outer_rate_is_gamma_times_the_inner_at_every_step(gamma: float, trained: int) -> None:
    settings = RecoverSettings(adapter="deep_lora", adapter_options=(f"gamma={gamma}",), rank=4, targets=("up_proj",))
    injected = inject(toy(), settings, None, 3, evidence())
    assert injected.trainable_parameters == trained
    assert isinstance(injected.adapter, PerModule)
    groups = injected.adapter.parameter_groups(injected.module, 0.5)
    optimizer = torch.optim.SGD([{"params": list(group.parameters), "lr": group.lr} for group in groups])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    (delta,) = injected.adapter.deltas(injected.module).values()
    before = {name: value.clone() for name, value in delta.state_dict().items()}
    for _ in range(4):
        inner, outer = (
            next(entry["lr"] for entry in optimizer.param_groups if any(parameter is wanted for parameter in entry["params"]))
            if any(wanted is parameter for parameter in delta.parameters())
            else None
            for wanted in (delta.core[0], delta.left)
        )
        assert outer is None if gamma == 0 else outer == pytest.approx(gamma * inner, rel=1e-12)
        optimizer.zero_grad()
        injected.module(**batch()).loss.backward()
        optimizer.step()
        schedule.step()
    moved = {name for name, value in delta.state_dict().items() if not torch.equal(value, before[name])}
    inner_factors = {"core.0", "core.1", "core.2"}
    # Outer gradients are of size eps^3: what they change is below the last bit of an entry here, unless the rate is large.
    assert inner_factors <= moved if gamma else moved == inner_factors


def test_the_rate_follows_the_width() -> None:
    assert scaled_rate(1e-4, (768, 768), (768, 768)) == pytest.approx(1e-4)
    assert scaled_rate(1e-4, (768, 768), (8, 8)) == pytest.approx(1e-4 * 768 / 8)
    delta = made((16, 64), 4, gamma=0.1)
    rates = delta.rates(None, 1e-4)
    assert rates["core.1"] == pytest.approx(1e-4 * 32 / 4)
    assert rates["left"] == rates["right"] == pytest.approx(0.1 * rates["core.0"])
    assert delta.rates(0.3, 1e-4) == pytest.approx({**dict.fromkeys(("core.0", "core.1", "core.2"), 0.3), "left": 0.03, "right": 0.03})


@pytest.mark.parametrize("name", ["deep_lora", "deep_lora-frozen", "deep_lora-narrow", "deep_lora-full"])
def test_trimming_keeps_the_function_to_the_tolerance(name: str) -> None:
    injected = FORMS[name].put_on(toy(), "linear", "conv1d")
    adapter = injected.adapter
    assert isinstance(adapter, PerModule)
    scramble(injected, 0.5)
    places = adapter.deltas(injected.module)
    dense = {place: delta.delta_weight().detach().double() for place, delta in places.items()}
    spectra = {place: torch.linalg.svdvals(change) for place, change in dense.items()}
    largest = max(float(values[0]) for values in spectra.values())
    tolerance = 0.3
    expected = {place: int((values > tolerance * largest).sum()) for place, values in spectra.items()}
    assert adapter.trim(injected.module, tolerance) == expected
    assert any(0 < rank < len(spectra[place]) for place, rank in expected.items())
    for place, delta in adapter.deltas(injected.module).items():
        dropped = torch.linalg.matrix_norm(dense[place] - delta.delta_weight().detach().double(), ord=2)
        assert float(dropped) <= tolerance * largest + 1e-6
        assert delta.stored()["left"].shape[1] == expected[place]


def test_a_change_of_rank_zero_is_taken_away() -> None:
    injected = FORMS["deep_lora"].put_on(toy(), "linear", "conv1d")
    assert isinstance(injected.adapter, PerModule)
    with torch.no_grad():
        for factor in injected.adapter.deltas(injected.module)["layers.0.up_proj"].core:
            factor.mul_(100)
    ranks = injected.adapter.trim(injected.module, 1e-3)
    assert ranks == {"layers.0.up_proj": 4, "layers.0.c_proj": 0}
    assert type(injected.model.layers[0].c_proj) is type(toy().layers[0].c_proj)
    merge(injected)


def test_trimming_is_an_option_of_the_training() -> None:
    settings = RecoverSettings(adapter="deep_lora", adapter_options=("trim=0.2",), rank=8, targets=("up_proj",))
    injected = inject(toy(), settings, None, 3, evidence())
    scramble(injected, 0.5)
    before = logits(injected.module)
    injected.adapter.finish(injected.module)
    (delta,) = injected.adapter.deltas(injected.module).values()
    assert delta.spec.rank < 8
    assert float((logits(injected.module) - before).abs().max()) > 0


def test_the_core_stays_in_float32_under_autocast() -> None:
    delta = made((24, 24), 4)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.float16):
        inner = delta._inner()
    assert inner.dtype == torch.float32
    assert inner[0, 0].item() == pytest.approx(1e-9, rel=1e-5)  # in float16 it would be zero
    assert math.isfinite(delta(x).abs().max().item())


BAD = [
    ({"rank": 7}, "rank 7 of 'layers.0.up_proj' is odd; .* use 6 or 8"),
    ({"rank": 26}, "rank 26 exceeds the limit 24 .* use `rank=24` or less"),
    ({"adapter_options": ("gamma=-1",)}, r"gamma: should be at least 0.0 \(got '-1'\)"),
    ({"adapter_options": ("gama=0.1",)}, "gama: unknown key; did you mean 'gamma'"),
    ({"adapter_options": ("form=wide",)}, "form: should be"),
    ({"alpha": 4.0}, "`alpha=4` has no effect on adapter 'deep_lora'"),
    ({"targets": ("up_prj",)}, "target 'up_prj' matches nothing; the model has: .*up_proj.*did you mean 'up_proj'"),
]


@pytest.mark.parametrize(("settings", "said"), BAD)
def test_bad_input_is_one_line_and_leaves_the_model_alone(settings: dict[str, Any], said: str) -> None:
    model = toy()
    values = {"adapter": "deep_lora", "rank": 4, "targets": ("up_proj",)} | settings
    with pytest.raises((InputError, ConfigError)) as raised:
        inject(model, RecoverSettings.model_validate(values), None, 0, evidence())
    assert re.search(said, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)
    assert set(model.state_dict()) == set(toy().state_dict())


def test_without_batches_it_says_what_it_needs() -> None:
    with pytest.raises(InputError, match="starts from gradients over training batches"):
        inject(toy(), RecoverSettings(adapter="deep_lora", targets=("up_proj",)), None, 0)
    assert "deep_lora" in ADAPTERS
