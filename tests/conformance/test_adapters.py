"""What every adapter must hold, on every kind of module and in every number type; found through the registry."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adapter_toys import FORMS, LAYERS, batch, logits, scramble, toy
from regraft.adapters import ADAPTERS, Method, make_request, make_specs
from regraft.adapters.linear_like import oriented, weight_of
from regraft.errors import InputError
from regraft.surgery.adapters import factors, finish, load_adapter, merge, save_adapter
from regraft.surgery.targets import find_targets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of a logit (of size 1 or so): rounding of the merged weight, and of the outputs, in that type.
CLOSE = {"float32": 1e-5, "bfloat16": 0.15, "float16": 0.02}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

PAIRS = [(name, layer) for name, form in FORMS.items() for layer in form.layers]


def pairs(names: Iterator[str] | None = None) -> pytest.MarkDecorator:
    chosen = set(names) if names is not None else set(FORMS)
    return pytest.mark.parametrize(("name", "layer"), [pair for pair in PAIRS if pair[0] in chosen])


def own() -> Iterator[str]:
    return (name for name, form in FORMS.items() if form.own)


def test_every_adapter_of_the_registry_is_here() -> None:
    assert {form.adapter for form in FORMS.values()} == set(ADAPTERS.names())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pairs()
def test_the_change_at_the_start_is_what_is_promised(name: str, layer: str, dtype: str, device: str) -> None:
    form, model = FORMS[name], toy(DTYPES[dtype], device)
    before, weight = logits(model, device), weight_of(model.get_submodule(full(layer))).detach().clone().float()
    injected = form.put_on(model, layer, device=device)
    rounding = 2e-6 if dtype == "float32" else CLOSE[dtype]
    assert float((logits(injected.module, device) - before).abs().max()) <= max(100 * form.start, rounding)
    merged = weight_of(merge(injected).get_submodule(full(layer))).detach().float()
    rounding = {"float32": 1e-6, "bfloat16": 0.02, "float16": 2e-3}[dtype]
    assert float((merged - weight).abs().max()) <= form.start + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pairs()
def test_forward_is_merged(name: str, layer: str, dtype: str, device: str) -> None:
    model = toy(DTYPES[dtype], device)
    before = logits(model, device)
    injected = FORMS[name].put_on(model, layer, device=device)
    scramble(injected)
    finish(injected)
    adapted = logits(injected.module, device)
    merged = merge(injected)
    assert merged is model
    assert type(merged.get_submodule(full(layer))) is type(toy().get_submodule(full(layer)))
    assert set(merged.state_dict()) == set(toy().state_dict())
    assert {p.dtype for p in merged.parameters()} == {DTYPES[dtype]}
    assert all(parameter.requires_grad for parameter in merged.parameters())
    apart, change = (float((adapted - other).abs().max()) for other in (logits(merged, device), before))
    assert apart <= min(CLOSE[dtype], change / 3)  # there is a change to lose


@pytest.mark.parametrize("device", DEVICES)
@pairs()
def test_the_exported_factors_are_the_change(name: str, layer: str, device: str) -> None:
    form, model, plain = FORMS[name], toy(device=device), toy(device=device)
    injected = form.put_on(model, layer, device=device)
    scramble(injected)
    finish(injected)
    if not form.exports:
        with pytest.raises(InputError, match="fold it in") as raised:
            factors(injected)
        assert "\n" not in str(raised.value)
        return
    adapted = logits(injected.module, device)
    found = factors(injected)
    assert set(found) == {full(layer)}
    factor, module = found[full(layer)], plain.get_submodule(full(layer))
    with torch.no_grad():
        weight_of(module).add_(oriented(module, factor.left.double() @ factor.right.double()).float())
    assert float((logits(plain, device) - adapted).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pairs()
def test_gradients_reach_the_adapter_alone(name: str, layer: str, dtype: str) -> None:
    if dtype == "float16" and layer == "embedding" and not FORMS[name].own:
        pytest.skip("PEFT keeps embedding factors in the base's type where the base is float16")
    model = toy(DTYPES[dtype])
    base = {id(parameter) for parameter in model.parameters()}
    injected = FORMS[name].put_on(model, layer)
    injected.module.train()
    injected.module(**batch()).loss.backward()
    trained = [parameter for parameter in injected.module.parameters() if parameter.requires_grad]
    assert trained
    assert not base & {id(parameter) for parameter in trained}
    assert all(parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) for parameter in trained)
    assert all(parameter.grad is None for parameter in injected.module.parameters() if not parameter.requires_grad)
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pairs(own())
def test_as_many_parameters_train_as_are_promised(name: str, layer: str) -> None:
    form, model = FORMS[name], toy()
    method = ADAPTERS.get(form.adapter)
    assert isinstance(method, Method)
    settings = form.settings(targets=(LAYERS[layer],))
    modules = find_targets(model, settings.targets)
    specs = make_specs(modules, make_request(modules, settings, None, 3))
    promised = sum(method.count(spec) for spec in specs.values())
    assert form.put_on(model, layer).trainable_parameters == promised > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(own()))
def test_saved_and_loaded_to_the_bit(name: str, dtype: str, device: str, tmp_path) -> None:
    injected = FORMS[name].put_on(toy(DTYPES[dtype], device), *LAYERS, device=device)
    scramble(injected)
    finish(injected)
    adapted = logits(injected.module, device)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_adapter(injected, tmp_path / folder, "base")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["adapter.json", "adapter.safetensors"]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    loaded = load_adapter(toy(DTYPES[dtype], device), tmp_path / "one")
    assert torch.equal(logits(loaded.module, device), adapted)
    again = tmp_path / "again"
    again.mkdir()
    save_adapter(loaded, again, "base")
    assert (again / "adapter.safetensors").read_bytes() == (tmp_path / "one" / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("name", FORMS)
def test_the_global_generators_are_left_alone(name: str) -> None:
    form = FORMS[name]

    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    model = toy()
    injected = form.put_on(model, "linear")
    injected.module.train()
    injected.module(**batch()).loss.backward()
    merge(injected)
    assert states() == before


@pytest.mark.parametrize("name", FORMS)
def test_first_values_follow_the_seed(name: str) -> None:
    def values(seed: int) -> list[torch.Tensor]:
        injected = FORMS[name].put_on(toy(), "linear", "conv1d", seed=seed)
        scramble(injected)  # the bases of a change that starts at zero show in what the same coefficients make
        return [logits(injected.module)]

    first, again, other = values(1), values(1), values(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    follows_from_the_weights = name in {"mora-sharing", "mora-rotation", "olora", "pissa", "eva", "diagonal"}
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)) == follows_from_the_weights


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if set(form.layers) != set(LAYERS)])
def test_what_cannot_be_adapted_is_refused_in_one_line(name: str) -> None:
    model = toy()
    before = logits(model)
    with pytest.raises(InputError) as raised:
        FORMS[name].put_on(model, "embedding")
    assert "\n" not in str(raised.value)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == set(toy().state_dict())


def full(layer: str) -> str:
    return {"linear": "layers.0.up_proj", "conv1d": "layers.0.c_proj", "embedding": "embed_tokens"}[layer]
