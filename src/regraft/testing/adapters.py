"""Checks that every adapter must pass, on every kind of module that it says it can be put on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regraft.adapters import ADAPTERS, Method, make_request, make_specs
from regraft.adapters.linear_like import oriented, weight_of
from regraft.errors import InputError
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import Injected, factors, finish, inject, load_adapter, merge, save_adapter
from regraft.surgery.targets import find_targets
from regraft.testing.require import generators_left_alone, require
from regraft.testing.toys import FULL_NAMES, LAYERS, Toy, batch, evidence, logits, toy


@dataclass(frozen=True)
class AdapterForm:
    """One adapter with options.

    Attributes:
        adapter: Its name in the registry.
        options: ``NAME=VALUE`` texts, as the settings have them.
        layers: Kinds of modules that it can be put on: ``linear``, ``conv1d``, ``embedding``.
        start: Largest entry of its change before the first step.
        exports: Whether it is a plain LoRA.
    """

    adapter: str
    options: tuple[str, ...] = ()
    layers: Sequence[str] = tuple(LAYERS)
    start: float = 0.0
    exports: bool = True

    @property
    def own(self) -> bool:
        """Returns whether regraft's own code injects it, and not PEFT's."""
        return isinstance(ADAPTERS.get(self.adapter), Method)

    def settings(self, **more: object) -> RecoverSettings:
        """Returns the settings of a recovery with it, of rank 4 and without dropout."""
        values: Mapping[str, object] = {
            "adapter": self.adapter, "adapter_options": self.options, "rank": 4, "dropout": 0.0, "steps": 20
        }  # fmt: skip
        return RecoverSettings.model_validate(dict(values) | more)

    def put_on(self, model: Toy, *layers: str, seed: int = 3, device: str = "cpu", **more: object) -> Injected:
        """Puts it on modules of the toy by their kinds, in place."""
        targets = tuple(LAYERS[layer] for layer in layers)
        return inject(model, self.settings(targets=targets, **more), None, seed, evidence(device))


def scramble(injected: Injected, size: float = 0.4, seed: int = 7) -> None:
    """Adds random numbers to all that is trained, so that the change is no longer small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injected.module.parameters():
            if parameter.requires_grad:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter))


def check_adapter(form: AdapterForm | str) -> None:
    """Checks a registered adapter on a toy model with a linear, a transposed and an embedding module, in float32.

    1. Its change before the first step is no larger than ``start``.
    2. The adapted model gives the logits of the merged one, and the merged one is the plain class with the plain names.
    3. Gradients reach the adapter alone, and all of it; the base is frozen.
    4. Its exported factors are its change; or it refuses in one line, where it is no plain LoRA.
    5. Saved and loaded it gives the same logits to the bit, and the same bytes when it is saved again.
    6. As many parameters train as it promises, and the global generators are left alone.
    7. What it cannot be put on is refused in one line, and nothing is changed.

    Args:
        form: The adapter with options and promises; or the name of one that keeps the defaults of :class:`AdapterForm`.

    Raises:
        NonconformingError: With what the adapter did.
    """
    form = AdapterForm(form) if isinstance(form, str) else form
    who = " ".join([f"adapter '{form.adapter}'", *form.options])
    for layer in form.layers:
        _check_start(who, form, layer)
        _check_merge(who, form, layer)
        _check_gradients(who, form, layer)
        _check_factors(who, form, layer)
        if form.own:
            _check_count(who, form, layer)
    if form.own:
        _check_saving(who, form)
    for layer in set(LAYERS) - set(form.layers):
        _check_refusal(who, form, layer)


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _check_start(who: str, form: AdapterForm, layer: str) -> None:
    model = toy()
    before = weight_of(model.get_submodule(FULL_NAMES[layer])).detach().clone()
    with generators_left_alone(who):
        injected = form.put_on(model, layer)
    after = weight_of(merge(injected).get_submodule(FULL_NAMES[layer])).detach()
    require(_apart(after, before) <= form.start + 1e-6, f"{who} on {layer} starts with a change of {_apart(after, before):.2g}")


def _check_merge(who: str, form: AdapterForm, layer: str) -> None:
    model = toy()
    before = logits(model)
    injected = form.put_on(model, layer)
    scramble(injected)
    finish(injected)
    adapted = logits(injected.module)
    merged = merge(injected)
    apart, change = _apart(adapted, logits(merged)), _apart(adapted, before)
    require(change > 1e-4, f"{who} on {layer}: random parameters change nothing")
    require(apart <= min(1e-5, change / 3), f"{who} on {layer}: attached and merged are {apart:.2g} apart")
    require(set(merged.state_dict()) == set(toy().state_dict()), f"{who} on {layer}: the merged model has other parameters")
    same = type(merged.get_submodule(FULL_NAMES[layer])) is type(toy().get_submodule(FULL_NAMES[layer]))
    require(same, f"{who} on {layer}: the merged module is of another class")


def _check_gradients(who: str, form: AdapterForm, layer: str) -> None:
    model = toy()
    base = {id(parameter) for parameter in model.parameters()}
    injected = form.put_on(model, layer)
    injected.module.train()
    injected.module(**batch()).loss.backward()
    trained = [parameter for parameter in injected.module.parameters() if parameter.requires_grad]
    require(bool(trained), f"{who} on {layer}: nothing is trained")
    require(not base & {id(parameter) for parameter in trained}, f"{who} on {layer}: the base is trained")
    reached = all(parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) for parameter in trained)
    require(reached, f"{who} on {layer}: a trained parameter has no finite gradient")


def _check_factors(who: str, form: AdapterForm, layer: str) -> None:
    plain, injected = toy(), form.put_on(toy(), layer)
    scramble(injected)
    finish(injected)
    if not form.exports:
        try:
            factors(injected)
        except InputError as refusal:
            require("\n" not in str(refusal), f"{who} refuses its export in more than one line")
        else:
            require(False, f"{who} is no plain LoRA and gives factors all the same")
        return
    adapted, name = logits(injected.module), FULL_NAMES[layer]
    found = factors(injected)
    require(set(found) == {name}, f"{who} on {layer}: factors for {sorted(found)}")
    with torch.no_grad():
        change = found[name].left.double() @ found[name].right.double()
        weight_of(plain.get_submodule(name)).add_(oriented(plain.get_submodule(name), change).float())
    require(_apart(logits(plain), adapted) <= 1e-5, f"{who} on {layer}: the exported factors are not the change")


def _check_count(who: str, form: AdapterForm, layer: str) -> None:
    method, model = ADAPTERS.get(form.adapter), toy()
    assert isinstance(method, Method)
    settings = form.settings(targets=(LAYERS[layer],))
    modules = find_targets(model, settings.targets)
    promised = sum(method.count(spec) for spec in make_specs(modules, make_request(modules, settings, None, 3)).values())
    trained = form.put_on(model, layer).trainable_parameters
    require(trained == promised > 0, f"{who} on {layer}: {trained} parameters train, {promised} are promised")


def _check_saving(who: str, form: AdapterForm) -> None:
    injected = form.put_on(toy(), *form.layers)
    scramble(injected)
    finish(injected)
    adapted = logits(injected.module)
    with tempfile.TemporaryDirectory() as work:
        first, second = Path(work, "first"), Path(work, "second")
        first.mkdir()
        second.mkdir()
        save_adapter(injected, first, "base")
        loaded = load_adapter(toy(), first)
        require(torch.equal(logits(loaded.module), adapted), f"{who}: loaded, it gives other logits")
        save_adapter(loaded, second, "base")
        same = (first / "adapter.safetensors").read_bytes() == (second / "adapter.safetensors").read_bytes()
        require(same, f"{who}: loaded and saved again, its bytes are others")


def _check_refusal(who: str, form: AdapterForm, layer: str) -> None:
    model = toy()
    before = logits(model)
    try:
        form.put_on(model, layer)
    except InputError as refusal:
        require("\n" not in str(refusal), f"{who} refuses {layer} in more than one line")
    else:
        require(False, f"{who} says that it cannot be put on {layer}, and can")
    require(torch.equal(logits(model), before), f"{who} refuses {layer} and changes the model")
