from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from regraft import registry as registry_module
from regraft.errors import InputError
from regraft.registry import Registry


@pytest.fixture
def shapes() -> Registry[int]:
    registry: Registry[int] = Registry("shape", group="regraft.test_shapes")
    registry.add("triangle", 3)
    registry.add("square", 4)
    return registry


def test_values_come_back_by_name(shapes: Registry[int]) -> None:
    assert shapes.get("square") == 4
    assert shapes.names() == ("square", "triangle")
    assert list(shapes) == ["square", "triangle"]
    assert "square" in shapes
    assert "circle" not in shapes


def test_the_decorator_registers_and_returns_what_it_decorates() -> None:
    registry: Registry[type] = Registry("kind", group="regraft.test_kinds")

    @registry.register("plain")
    class Plain:
        pass

    assert registry.get("plain") is Plain


def test_a_name_is_taken_once(shapes: Registry[int]) -> None:
    with pytest.raises(InputError, match="shape 'square' is registered twice"):
        shapes.add("square", 5)
    assert shapes.get("square") == 4


@pytest.mark.parametrize(("name", "hint"), [("squre", "; did you mean 'square'?"), ("zzz", "triangle")])
def test_an_unknown_name_lists_what_there_is(shapes: Registry[int], name: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        shapes.get(name)
    assert str(caught.value).startswith(f"unknown shape '{name}'; known: square, triangle")
    assert str(caught.value).endswith(hint)


def test_packages_from_outside_use_the_same_door(shapes: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("tau", "math:tau", group), EntryPoint("e", "math:e", group)]

    monkeypatch.setattr(registry_module, "entry_points", points)
    assert shapes.names() == ("e", "square", "tau", "triangle")
    assert shapes.get("tau") == pytest.approx(6.283185307179586)
    assert asked == ["regraft.test_shapes"]


def test_an_outside_name_does_not_replace_a_built_in(shapes: Registry[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [EntryPoint("square", "math:tau", group)])
    with pytest.raises(InputError, match="registered twice"):
        shapes.get("square")
