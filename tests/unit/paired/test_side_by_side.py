"""Several adapters on one model: switched, weighed, merged together and saved each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapter_toys import FORMS, logits, scramble, toy
from regraft.errors import InputError
from regraft.surgery.adapters import Injected, activate, inject, load_adapter, merge, save_adapter


def two(path: Path | None = None) -> tuple[Injected, Injected, dict[str, torch.Tensor]]:
    """Deep LoRA and, on other modules and the same, MoRA; with what each gives alone."""
    alone: dict[str, torch.Tensor] = {}
    for name, form, layers in (("first", "deep_lora", ("linear", "embedding")), ("second", "mora-rotation", ("linear", "conv1d"))):
        injected = FORMS[form].put_on(toy(), *layers)
        scramble(injected, seed=len(name))
        alone[name] = logits(injected.module)
        if path is not None:
            (path / name).mkdir()
            save_adapter(injected, path / name, "base")
    assert path is not None
    model = toy()
    first = load_adapter(model, path / "first", name="first")
    second = load_adapter(model, path / "second", name="second", beside=first)
    return first, second, alone


def test_each_alone_none_and_both(tmp_path: Path) -> None:
    first, second, alone = two(tmp_path)
    model = first.model
    for name, wanted in alone.items():
        activate(model, {name: 1.0})
        assert torch.equal(logits(model), wanted)
    activate(model, {})
    assert torch.equal(logits(model), logits(toy()))
    activate(model, {"first": 0.5, "second": -2.0})
    weighed = logits(model)
    dense = toy()
    for injected, share in ((first, 0.5), (second, -2.0)):
        for name, delta in injected.adapter.deltas(injected.module).items():  # type: ignore[attr-defined]
            module = dense.get_submodule(name)
            change = delta.delta_weight().detach() * share
            with torch.no_grad():
                module.weight.add_(change if isinstance(module, torch.nn.Linear) else change.T)
    torch.testing.assert_close(weighed, logits(dense), rtol=0, atol=2e-4)
    torch.testing.assert_close(logits(merge(second)), weighed, rtol=0, atol=2e-4)
    assert set(model.state_dict()) == set(toy().state_dict())


def test_each_is_saved_by_itself(tmp_path: Path) -> None:
    first, second, _ = two(tmp_path)
    for name, injected in (("first", first), ("second", second)):
        again = tmp_path / f"{name}-again"
        again.mkdir()
        save_adapter(injected, again, "base")
        assert (again / "adapter.safetensors").read_bytes() == (tmp_path / name / "adapter.safetensors").read_bytes()
        assert (again / "adapter.json").read_text() == (tmp_path / name / "adapter.json").read_text()


def test_names_that_are_not_there_or_there_twice(tmp_path: Path) -> None:
    first, _, _ = two(tmp_path)
    with pytest.raises(InputError, match="no adapter 'third'; it has: first, second"):
        activate(first.model, {"third": 1.0})
    with pytest.raises(InputError, match="has an adapter 'first' already"):
        inject(first.model, FORMS["nola"].settings(targets=("up_proj",)), None, 0, name="first", beside=first)
    with pytest.raises(InputError, match="adapter 'lora' does not stand beside another one"):
        inject(first.model, FORMS["lora"].settings(targets=("up_proj",)), None, 0, name="third", beside=first)
